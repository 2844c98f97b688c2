"""Checkpoints of a run (Orbax): asynchronous, atomic, self-describing.

WORKDIR/config.json is the run's resolved config; WORKDIR/checkpoints/<step>/ holds the items
``params``, ``ema_params``, ``training`` (step and optimizer) and ``config``; WORKDIR/scores.json
the metrics of the evaluated steps.

Inside a function: Orbax, which is slow to import.
"""

import contextlib
import errno
import glob
import json
import logging
import math
import os
import sys

import jax
import numpy as np
from etils import epath

from ddpm_jax.config import differing_fields
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.runners import fetch, one_copy_a_host
from ddpm_jax.storage.files import (
    is_remote,
    listing,
    read_json,
    remove,
    resolve,
    storage_errors,
    write_bytes,
    write_json,
)

PART_BYTES = 128 << 20


def read_config(workdir) -> dict | None:
    """The run's config, or None where the folder holds no run.

    Raises UserError where it is damaged, or the folder is the ``checkpoints`` of a run.
    """
    folder = resolve(workdir)
    path = folder / "config.json"
    if not path.exists():
        for inner in (folder, folder.parent):
            if inner.name == "checkpoints" and (inner.parent / "config.json").exists():
                raise UserError(f"--workdir={folder} is inside the run {inner.parent}: give "
                                f"--workdir={inner.parent}")
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy, or from the "
                        "'config' item of a checkpoint beside it") from None


def claim(workdir, config: dict, *, write=True) -> list[str]:
    """Make the folder this run's, or check that it already is (then only allowed fields differ).

    A folder without a checkpoint, as a start that failed leaves it, takes any config. -> the fields
    that it changed. Raises UserError naming the fields that differ, or the folder that cannot be
    written.
    """
    folder = resolve(workdir)
    old = read_config(folder)
    saved = [name for name in listing(folder / "checkpoints") if name.isdigit()]
    wrong = [] if old is None else differing_fields(old, config)
    if wrong and saved:
        raise UserError(f"--workdir={folder} belongs to a run with another config: "
                        f"{'; '.join(wrong)}; take the old values, or another --workdir, with "
                        f"--init_from={folder} to continue from its weights")
    if old is None and saved:
        raise UserError(f"{folder} has checkpoints but no config.json: not a run of ddpm; take "
                        "another --workdir")
    if write:
        with storage_errors(folder, "write to --workdir", "choose a folder that you may write to"):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
    return wrong


def claim_data(workdir, facts: dict, *, resumed: bool, write=True) -> None:
    """Store the facts of the training data (data.labels.data_facts) in data.json or, for a run that
    was resumed, compare the fingerprints. Raises UserError where one is another."""
    path = resolve(workdir) / "data.json"
    stored = read_json(path) if path.exists() else {}
    for name, what in (("train", "images"), ("labels", "labels")):
        old, new = stored.get(name), facts.get(name)
        if resumed and old not in (None, new):
            raise UserError(
                f"--workdir={path.parent} was trained on other {what} (fingerprint {old}; now "
                f"{new}): give data.dir with the same images, or another --workdir; to train on "
                f"these, delete {path}")
    if write and stored != facts:
        write_json(path, facts)


def class_names(workdir) -> tuple:
    """The names of the classes that the run was trained with; () where they are not known."""
    path = resolve(workdir) / "data.json"
    return tuple(read_json(path).get("classes", ())) if path.exists() else ()


def start_warning(workdir, decay: float, step: int) -> str:
    """What to print where the averaged weights of ``step`` still hold more than 1 % of the first
    ones, which are random but in an imported run; '' elsewhere."""
    share = decay ** step
    if share <= 0.01 or (resolve(workdir) / "import.json").exists():
        return ""
    return (f"warning: at step {step} the averaged weights hold {100 * share:.0f} % of the random "
            f"start (ema.decay={decay}): use --noema, train longer, or train with a smaller "
            "ema.decay")


class _Literal(type(epath.Path("/"))):
    """A path whose brackets are no pattern. etils hands them to ``glob`` unescaped, and Orbax finds
    what it has to merge after a save by ``glob``."""

    def glob(self, pattern):
        return map(type(self), epath.Path(glob.escape(str(self))).glob(pattern))


def _not_from_orbax(record) -> bool:
    """A failed save is one line, from ``_failures``; Orbax logs pages before it raises."""
    return "orbax" not in record.pathname


def _mark_complete(folder):
    """Mark copied steps as saved. A disk's steps are complete where they have their name; on a
    bucket Orbax passes over those without a file, which older versions of it wrote there alone."""
    for name in listing(folder):
        mark = folder / name / "commit_success.txt"
        metadata = folder / name / "_CHECKPOINT_METADATA"
        if name.isdigit() and metadata.exists() and not mark.exists():
            if read_json(metadata).get("commit_timestamp_nsecs"):  # written last, but for the mark
                write_bytes(mark, b"")


class _Best:
    """Orbax's policy to keep the lowest of ``scores``, which come after the save: an evaluation
    takes long, and what it evaluates should be safe before."""

    def __init__(self, metric, scores):
        self._metric, self._scores = metric, scores

    def should_preserve(self, checkpoints, *, context):
        del context
        values = [self._scores.get(c.step, {}).get(self._metric, math.nan) for c in checkpoints]
        lowest = min((v for v in values if math.isfinite(v)), default=None)
        return [v == lowest for v in values]


class Checkpoints:
    """The checkpoints of one run. Every process calls every method, at the same steps."""

    def __init__(self, workdir, *, keep=2, keep_every=0, best="", read_only=False,
                 background=True):
        """keep: newest ones kept; keep_every: steps whose multiples are kept too (0 = none);
        best: metric whose lowest value's checkpoint is kept too ('' = none), by ``scored``; what a
        step scored after the newest checkpoint is forgotten. background: save while the caller goes
        on, from a copy of each numpy array; else one after the other, without."""
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_not_from_orbax)
        managers = ocp.checkpoint_managers
        policies = [managers.LatestN(n=max(keep, 1))]
        if keep_every:
            policies.append(managers.EveryNSteps(interval_steps=keep_every))
        self.scores = {}  # {step: {metric: number}}
        if best:
            policies.append(_Best(best, self.scores))
        self._ocp = ocp
        self.folder = _Literal(resolve(workdir)) / "checkpoints"
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        if is_remote(self.folder):
            hosts.on_main_process(_mark_complete, self.folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=background,
                save_decision_policy=managers.FixedIntervalPolicy(1),
                preservation_policy=managers.AnyPreservationPolicy(policies),
            ),
        )
        self._verified = False  # whether a save of this object was read back
        self._score_file = self.folder.parent / "scores.json"
        if not read_only:
            newest = self.latest() or 0
            self.scores.update({step: values for step, values in self._read_scores().items()
                                if step <= newest})

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def _read_scores(self):
        if not self._score_file.exists():
            return {}
        try:
            return {int(step): values
                    for step, values in json.loads(self._score_file.read_text()).items()}
        except (AttributeError, ValueError) as error:
            raise UserError(f"{self._score_file} is damaged ({error}); delete it, and steps are "
                            "evaluated again") from None

    def scored(self, step: int, values: dict) -> None:
        """Record the metrics of ``step``, the same on every process. Where they cannot be written,
        the next call writes them too."""
        self.scores[step] = dict(values)
        if hosts.is_main_process():
            try:
                write_json(self._score_file, self.scores, allow_nan=True)
            except UserError as error:
                logging.getLogger(__name__).warning("%s; the run continues", error)

    def save(self, step: int, state, config: dict, *, verify=False) -> None:
        """Start saving TrainState ``state`` (global arrays, not donated before ``wait`` returns).

        The first save, and any with ``verify``, is waited for and read back. Raises UserError where
        a save fails or reads back differently.
        """
        if step not in self._manager.all_steps():
            args, items = self._ocp.args, jax.tree.map(one_copy_a_host, _items(state))
            with self._failures(f"saving step {step}"):
                self._manager.save(step, args=args.Composite(
                    config=args.JsonSave(config),
                    **{name: args.StandardSave(tree) for name, tree in items.items()}))
        if verify or not self._verified:
            self._verify(step, state)

    def try_path(self) -> None:
        """Save, read and remove one number, so that a path that Orbax cannot write, as one that is
        not UTF-8, fails before the first step and not at the first save. Raises UserError."""
        path = self.folder.parent / "trial-save"
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(f"--workdir={path.parent} is not UTF-8, which Orbax needs: take "
                            "another name") from None
        with self._failures("a trial save"), self._ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"x": np.ones(1)}, force=True)
            checkpointer.wait_until_finished()
            checkpointer.restore(path, {"x": np.ones(1)})
        hosts.on_main_process(remove, path)

    def _verify(self, step, state):
        """Read the step back in parts of PART_BYTES, on the host: neither a device nor an import
        has room for a second state."""
        self.wait()
        self._verified = True
        args, handler = self._ocp.args, self._ocp.PyTreeCheckpointHandler()
        as_numpy = self._ocp.RestoreArgs(restore_type=np.ndarray)
        for item, tree in _items(state).items():
            leaves, structure = jax.tree.flatten(tree)
            part_of = np.cumsum([x.size * x.dtype.itemsize for x in leaves]) // PART_BYTES
            for part in np.unique(part_of):
                like = structure.unflatten([
                    np.broadcast_to(np.zeros((), x.dtype), x.shape) if k == part else ...
                    for x, k in zip(leaves, part_of, strict=True)])
                with self._damage(step):
                    read = handler.restore(self.folder / str(step) / item, args=args.PyTreeRestore(
                        item=like, restore_args=jax.tree.map(lambda _: as_numpy, like)))
                if not all(a is ... or _same(x, a)
                           for x, a in zip(leaves, jax.tree.leaves(read), strict=True)):
                    raise UserError(
                        f"checkpoint {step} in {self.folder} was written without an error, but its "
                        f"{item} read back differently: the disk or its file system lost data; "
                        "check it, and take another --workdir")

    def wait(self) -> None:
        """Block until what was started is on disk."""
        with self._failures("saving"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, step: int, like, runner=None):
        """The TrainState saved at ``step``, laid out as ``like`` (arrays or ShapeDtypeStructs) or,
        with ``runner``, on its devices as its programs take it."""
        args = self._ocp.args
        like = _on_all_devices(like, runner)
        with self._damage(step):
            read = self._manager.restore(step, args=args.Composite(**{
                name: args.StandardRestore(tree) for name, tree in _items(like).items()}))
        return _as_programs_take(like._replace(
            params=read.params, ema_params=read.ema_params, **read.training), runner)

    def restore_weights(self, step: int | None, like, *, ema: bool, runner=None):
        """-> (params, step): the weights alone, laid out as by ``restore``. step None: the newest.

        Raises UserError where there is no such checkpoint (the ones there are are listed), or
        it is damaged.
        """
        step = self.find(step)
        args, item = self._ocp.args, "ema_params" if ema else "params"
        with self._damage(step):
            read = self._manager.restore(step, args=args.Composite(
                **{item: args.StandardRestore(_on_all_devices(like, runner))}))
        return _as_programs_take(read[item], runner), step

    def find(self, step: int | None) -> int:
        """The checkpoint of that step, or the newest. Raises UserError where there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.folder}: train first (`ddpm train "
                            f"--workdir={self.folder.parent} ...`)")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"--step={step}: no such checkpoint in {self.folder}; there are "
                            f"{', '.join(map(str, steps))}")
        return step

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _failures(self, doing):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types for a failed write
            last = self.latest()
            kept = f"the last good checkpoint is step {last}" if last is not None else "none yet"
            raise UserError(f"{doing} in {self.folder} failed: {_reason(error)}; {kept}") from error

    @contextlib.contextmanager
    def _damage(self, step):
        printed = sys.unraisablehook

        def hook(unraisable):
            # Orbax closes its event loop at the first failed read; TensorStore reports the other
            # reads to it later, and each would print a traceback.
            if "Event loop is closed" not in str(unraisable.exc_value):
                printed(unraisable)

        sys.unraisablehook = hook
        try:
            yield
        except Exception as error:  # as many types for a damaged one
            others = [s for s in self.steps() if s != step]
            raise UserError(
                f"checkpoint {step} in {self.folder} cannot be read: {_reason(error)}; move the "
                f"folder {step} away to resume from another (there are: {others or 'none'}), or "
                "see 'A checkpoint cannot be read' in launch/TROUBLESHOOTING.md") from error
        sys.unraisablehook = printed


def _items(state) -> dict:
    """The trees of a TrainState by the name of their item in a checkpoint."""
    rest = {k: v for k, v in state._asdict().items() if "params" not in k and v is not None}
    return {"params": state.params, "ema_params": state.ema_params, "training": rest}


def _same(written, read) -> bool:
    """Equal in shape and in the sum of their bits (which NaN has too), in what this process has."""
    parts = [(written, ...)]
    if isinstance(written, jax.Array):
        parts = {str(s.index): (s.data, s.index) for s in written.addressable_shards}.values()
    return written.shape == read.shape and all(_same_bits(x, read[i]) for x, i in parts)


def _same_bits(written, read):
    a, b = np.ascontiguousarray(written), np.ascontiguousarray(read)
    bits = f"u{a.dtype.itemsize}"
    return a.shape == b.shape and a.dtype == b.dtype and (
        a.view(bits).sum(dtype=np.uint64) == b.view(bits).sum(dtype=np.uint64))


def _on_all_devices(like, runner):
    """What Orbax restores: laid out as ``like`` where that has shardings, else whole everywhere."""
    if runner is None:
        return like
    whole = jax.sharding.NamedSharding(runner.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda s: s.update(sharding=s.sharding or whole), like)


def _as_programs_take(tree, runner):
    """Restored arrays as the runner's programs take them (pmap's are laid out otherwise)."""
    if runner is None or runner.to_global(tree) is tree:
        return tree
    return runner.put("replicated", fetch(tree))


def _reason(error) -> str:
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno)
    text = str(error)
    for code in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        if os.strerror(code).lower() in text.lower():
            return os.strerror(code)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
