"""The paper's tables and figures as rows of one table, and the configs of their cells."""

import json
from typing import NamedTuple

from ddpm_jax.config import differing_fields, flatten, load_config, override, to_json
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.options import Options
from ddpm_jax.reproduction.paper_results import CELLS, CHAINS, ours, verdict
from ddpm_jax.storage import files


class Target(NamedTuple):
    """cells: of CELLS; metrics: of `ddpm evaluate`; keys: columns of the table; figure: a row of
    figures.FIGURES or None; chains: what samples are drawn by, () for the config's sampler."""
    text: str
    cells: tuple
    metrics: tuple
    keys: tuple
    figure: str | None = None
    chains: tuple = ()


def _cells(config) -> tuple:
    return tuple(name for name, cell in CELLS.items() if cell.of == config)


TABLE_KEYS = ("is", "fid_train", "fid_test", "bpd_test", "bpd_train")
TARGETS = {
    "table1": Target("Table 1, the two rows of this paper: CIFAR-10",
                     ("eps_fixed_l", "eps_fixed_simple"), ("is", "fid", "bpd"), TABLE_KEYS),
    "table2": Target("Table 2: parameterisation, objective and variance, CIFAR-10",
                     _cells("cifar10_table2"),
                     ("is", "fid"), ("is", "fid_train")),
    "improved": Target("Nichol & Dhariwal 2021, Table 2: CIFAR-10 by chain and objective",
                       _cells("cifar10_improved"), ("fid", "bpd"), ("fid_train", "bpd_test")),
    "fast": Target("FID by network calls: samplers on the paper's weights, CIFAR-10",
                   ("eps_fixed_simple",), ("fid",), ("fid_train",), chains=CHAINS),
    "table4": Target("Table 4: rate and distortion of the progressive code, CIFAR-10 test",
                     ("eps_fixed_simple",), ("bpd",), ("bpd_test",), "rate"),
    "fig5": Target("Fig. 5: rate and distortion against reverse steps, CIFAR-10 test",
                   ("eps_fixed_simple",), ("bpd",), ("bpd_test",), "rate"),
    "fig7": Target("Fig. 7: samples that share a latent x_t", ("eps_fixed_simple",), (), (),
                   "shared"),
    "fig8": Target("Fig. 8: interpolation between two images at half of the chain",
                   ("eps_fixed_simple",), (), (), "interpolation"),
    "fig10": Target("Fig. 6 and 10: quality of the predicted x_0 along the way",
                    ("eps_fixed_simple",), (), (), "progressive"),
    "nearest": Target("Fig. 12 and 15: nearest training images of samples",
                      ("eps_fixed_simple",), ("nn",), ("nn_pixels_exact_copies",)),
}


class Request(NamedTuple):
    """What to reproduce. root: folder of the runs, one for each cell; config: name or file under
    the cells, None: the paper's; settings: FIELD=VALUE of each cell's config; options: of the
    evaluation, metrics aside."""

    target: Target
    root: str | None = None
    config: str | None = None
    settings: tuple = ()
    options: Options = Options()

    @property
    def is_paper(self) -> bool:
        """Whether the paper's values can be compared with."""
        return not self.config and not self.settings


def cell_config(request: Request, name: str):
    """The config of the cell `name`. Raises UserError naming a wrong field or value."""
    config = load_config(CELLS[name].config)
    if request.config:
        cell, config = config.diffusion, load_config(request.config)
        config.diffusion.update({field: cell[field] for field in ("predict", "variance", "loss")})
    known = flatten(to_json(config))
    for text in request.settings:
        field, equals, value = text.partition("=")
        if not equals or field not in known:
            raise UserError(f"--set={text}: expected FIELD=VALUE with a field of the config, "
                            "such as train.steps=100")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        try:
            override(config, {field: tuple(parsed) if isinstance(parsed, list) else parsed})
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"--set={text}: expected a value such as {json.dumps(known[field])}, "
                            "which the config has") from None
    return config


# Fields that make a model the cell's, and among them those of training alone, which files of
# weights do not have.
_OF_A_MODEL = ("data.name", "data.image_size", "data.channels", "model.", "diffusion.")
_OF_TRAINING = ("model.dropout", "model.label_dropout", "model.remat", "diffusion.weights.")


def is_imported(folder) -> bool:
    """Whether `ddpm import` made the run in ``folder``."""
    return files.exists(files.join(folder, "import.json"))


def check_imported(request: Request, name: str, stored: dict) -> None:
    """Raise UserError where an imported run with the config ``stored`` is not the model of the
    cell ``name``, whose values it would be compared with."""
    wrong = [text for text in differing_fields(stored, to_json(cell_config(request, name)))
             if text.startswith(_OF_A_MODEL) and not text.startswith(_OF_TRAINING)]
    if wrong:
        remedy = (f"with --config={CELLS[name].config}" if request.is_paper else
                  "with the fields that --config and --set give the cell")
        raise UserError(f"--workdir={request.root}: the run imported into {name} is another model "
                        f"than that cell's ({'; '.join(wrong)}); import it {remedy}, or into the "
                        "folder of the cell that it is")


def existing(folder) -> dict:
    """evaluation.json of a run's folder, {} where there is none."""
    path = files.join(folder, "evaluation.json")
    return files.read_json(path) if files.exists(path) else {}


def wanted_splits(target, splits) -> tuple:
    """Those of a data set's splits whose bits/dim the target shows, else all."""
    return tuple(s for s in splits if f"bpd_{s}" in target.keys) or tuple(splits)


HEADER = ("model", "value", "the paper's", "band", "ours", "verdict")
DRAWN_BY = "chain"  # in the provenance of samples: whose published number they are compared with


def name_of(chain, calls) -> str:
    """The value of DRAWN_BY for samples by a row of CHAINS."""
    return f"{chain.title}, {calls} network calls"


def by_own_sampler(config):
    """-> counts(provenance), for ``ours``: samples are of the config's sampler."""
    own = {"sampler": config.sampler.name,
           "sampler_steps": config.sampler.steps or config.diffusion.num_timesteps}
    return lambda facts: DRAWN_BY not in facts and all(
        facts.get(name, value) == value for name, value in own.items())


def by_chain(chain, calls):
    """-> counts(provenance), for ``ours``: samples are of this row of CHAINS."""
    return lambda facts: facts.get(DRAWN_BY) == name_of(chain, calls)


def table_rows(request: Request) -> list[list]:
    """A row under HEADER for each value that the paper reports or a run in request.root has."""
    rows, target = [], request.target
    for name in target.cells:
        cell = CELLS[name]
        document = existing(f"{request.root}/{name}") if request.root else {}
        if target.chains:
            rows += _chain_rows(request, document)
            continue
        found = ours(document, target.keys, by_own_sampler(cell_config(request, name)))
        keys = [k for k in target.keys if k in cell.values or k in found]
        for key in keys or [""] * bool(target.keys):
            value = found.get(key)
            if not request.is_paper:
                rows.append([cell.title, key, None, None, value, ""])
                continue
            band = cell.bands.get(key)
            rows.append([
                cell.title, key, "unstable" if cell.unstable else cell.values.get(key),
                "{:g} to {:g}".format(*band) if band else None, value, verdict(key, value, cell)])
    return rows


def _chain_rows(request, document):
    key, = request.target.keys
    rows = []
    for chain in request.target.chains:
        for calls, published in chain.fids.items():
            value = ours(document, (key,), by_chain(chain, calls)).get(key)
            rows.append([chain.title, f"{key}, {calls} calls", None, None, value, ""])
            if request.is_paper:
                rows[-1][2:] = [
                    " and ".join(map("{:g}".format, published)) or "not published",
                    "{:g} to {:g}".format(*chain.bands[calls]), value,
                    verdict(calls, value, chain)]
    return rows
