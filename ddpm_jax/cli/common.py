"""Flags that several subcommands share, and what they do before a device is touched.

A subcommand is a module with ``define_flags(define)`` and ``main(values, words)``: `define` is a
`Definer`, `values` its FlagValues after parsing (one set for each call of ``cli.main.main``, so
that it can be called again, from a notebook too), `words` the arguments that are no flags.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags

from ddpm_jax import names
from ddpm_jax.errors import UserError, did_you_mean
from ddpm_jax.parallel import pod_flags
from ddpm_jax.storage import files


class _PathParser(flags.ArgumentParser):
    """A path in which a leading ~ stands for the home folder, whatever the shell did."""

    def parse(self, argument):
        return os.path.expanduser(argument)


class _ConfigParser(flags.ArgumentParser):
    """A config by `config.load_with_fields`, with the fields that the command line sets."""

    def __init__(self, words):
        self._words = words

    def parse(self, argument):
        fields = {}
        for word, following in zip(self._words, [*self._words[1:], ""], strict=True):
            match = re.match(r"--?(?:no)?config\.([\w.]+)(=?)(.*)", word, re.DOTALL)
            if match:
                fields[match[1]] = match[3] if match[2] else following
        from ddpm_jax.config import load_with_fields

        return load_with_fields(os.path.expanduser(argument), fields)


class _ListFlag(flags.MultiFlag):
    """A list cut at the commas that are not inside brackets; repeated flags are joined."""

    def _parse(self, arguments):
        texts = [arguments] if isinstance(arguments, str) else arguments
        return texts and [word.strip() for text in texts
                          for word in re.split(r",(?![^\[(]*[\])])", text) if word.strip()]


class Definer:
    """Defines flags in ``values``: string, integer, float, bool, enum, multi_string as absl's
    DEFINE_*(name, default, help), and the project's own. words: the command line, of which
    ml_collections takes the fields that follow --config."""

    def __init__(self, words=()):
        self.values = flags.FlagValues()
        self._words = list(words)
        for kind in ("string", "integer", "float", "bool", "enum", "multi_string"):
            define = getattr(flags, f"DEFINE_{kind}")
            setattr(self, kind, functools.partial(define, flag_values=self.values))

    def path(self, name, default, text):
        """A file, a folder or gs://BUCKET/PATH."""
        flags.DEFINE(_PathParser(), name, default, text, flag_values=self.values)

    def multi_path(self, name, text):
        """As ``path``; may be repeated."""
        flags.DEFINE_multi(_PathParser(), flags.ArgumentSerializer(), name, [], text,
                           flag_values=self.values)

    def list(self, name, default, text):
        """Words between commas, [1,2] is one of them; may be repeated."""
        flag = _ListFlag(flags.ArgumentParser(), flags.ArgumentSerializer(), name, default, text)
        flag.help = text    # absl adds a line
        flags.DEFINE_flag(flag, self.values)

    def config(self, of_run=False):
        """--config and its fields, in any order. of_run: without it, that of the run in --workdir
        or in --init_from."""
        self._words = _with_config_first(self._words, of_run)
        config_flags.DEFINE_config_file(
            "config", None, "a config file, or the name of a packaged one "
            f"({', '.join(names.packaged_configs())}); fields: --config.train.steps=1000",
            flag_values=self.values, sys_argv=self._words)
        self.values["config"].parser = _ConfigParser(self._words)

    def workdir(self):
        self.path("workdir", None, "folder of the run (a path, or gs://bucket/path)")

    def weights(self):
        self.integer("step", None, "checkpoint to read; default: the newest")
        self.bool("ema", True, "the averaged weights; --noema: the raw ones")

    def sampler(self):
        samplers = names.table("diffusion/sampling.py", "SAMPLERS")
        self.enum("sampler", None, samplers, "default: the run's sampler.name")
        self.integer("steps", None, "network calls for an image; default: the run's sampler.steps")
        nodes = names.table("diffusion/nodes.py", "NODES")
        self.string("nodes", None, f"timesteps visited: {', '.join(nodes)}, or a list such as "
                    "0,20,99; default: as the sampler needs")
        self.float("guidance", None, "classifier-free guidance, 1 = off; default: the run's "
                   "sampler.guidance")

    def pod(self):
        pod_flags.define_flags(self.values)

    def renamed(self, old, new):
        """--old is read as --new: an earlier spelling, which no help lists."""
        self._words = [re.sub(rf"^(--?){old}(?=$|=)", rf"\1{new}", word) for word in self._words]

    def parse(self):
        """Read the flags; -> the words that are none. Raises UserError, flags.Error."""
        try:
            return self.values(["ddpm", *self._words])[1:]
        except flags.UnrecognizedFlagError as error:
            raise UserError(f"no flag --{error.flagname} here{self._near(error.flagname)}"
                            ) from None
        except flags.IllegalFlagValueError as error:
            raise UserError(_in_words(str(error))) from None
        except (AttributeError, KeyError) as error:
            raise UserError(f"config has no field {_first_line(error)!r}") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"in --config: {error}") from None

    def _near(self, name) -> str:
        """What a misspelt flag may have meant: a flag, or with --config one of its fields."""
        if "config" not in self.values:
            return did_you_mean(name, self.values, "--")
        if name.startswith("config."):
            return ": it changes a field of --config, which is missing"
        fields = [f"config.{field.name}" for field in names.config_fields()]
        return did_you_mean(name, [*self.values, *fields], "--")


def _find(words, name):
    """-> (position, number of words, value) of --name=VALUE or --name VALUE; None where absent."""
    for i, word in enumerate(words):
        match = re.fullmatch(rf"--?{name}(?:=(.*))?", word, re.DOTALL)
        if match and match[1] is not None:
            return i, 1, match[1]
        if match and i + 1 < len(words):
            return i, 2, words[i + 1]
    return None


def _with_config_first(words, of_run) -> list[str]:
    """--config before its fields, which ml_collections does not know earlier."""
    found = _find(words, "config")
    if found:
        i, count, _ = found
        return [*words[i:i + count], *words[:i], *words[i + count:]]
    for flag in ("workdir", "init_from") if of_run else ():
        run = _find(words, flag)
        file = run and files.join(re.sub(r":\d+$", "", os.path.expanduser(run[2])), "config.json")
        if file and files.exists(file):
            return [f"--config={file}", *words]
    return list(words)


# What absl and ml_collections report of a flag's value, as regular expressions, in words.
_WORDS = {
    r"invalid literal for int\(\).*": "expected a whole number",
    r"could not convert string to float.*": "expected a number",
    r"(\('?)?Non-boolean argument to boolean flag.*": "expected true or false",
}


def _in_words(text) -> str:
    for theirs, ours in _WORDS.items():
        text = re.sub(f": {theirs}", f": {ours}", text, flags=re.DOTALL)
    text = re.sub(": value should be one of <(.*)>",
                  lambda match: f": expected one of {match[1].replace('|', ', ')}", text)
    return text.removeprefix("flag ")


def _first_line(error) -> str:
    """Of an error of ml_collections, which may quote a whole config with escaped line ends."""
    return str(error.args[0]).replace("\\n", "\n").splitlines()[0].strip("\\'\"")


def required(values, name: str):
    value = values[name].value
    if value is None or value == "":
        raise UserError(f"--{name} is missing")
    return value


def no_words(words) -> None:
    if words:
        raise UserError(f"unexpected argument {words[0]!r}; flags start with --")


def config_name(values) -> str:
    """The value of --config without folder, suffix and argument; for a run's config.json the name
    of the run's folder."""
    from ddpm_jax.config import config_path

    file = pathlib.Path(config_path(os.path.expanduser(values["config"].config_filename))[0])
    return file.resolve().parent.name if file.suffix == ".json" else file.stem


def join(values, config=None):
    """Cache, pod, agreement of the hosts: before anything touches a device. -> (stop, watchdog)"""
    import jax

    from ddpm_jax.compilation.cache import enable_compilation_cache
    from ddpm_jax.config import to_json
    from ddpm_jax.parallel import hosts, pod, stop, watchdog

    cache = enable_compilation_cache()
    pinned = hosts.pin_settings()
    pod.initialize(values)
    facts = {}
    if config is not None:
        text = json.dumps(to_json(config), sort_keys=True)
        facts["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    hosts.check_same_everywhere(facts)
    if jax.process_index() == 0:
        print(f"compilation cache: {cache or 'off'}", file=sys.stderr)
        if pinned:
            print(f"ignored, because the numbers depend on it: {', '.join(pinned)}",
                  file=sys.stderr)
    return stop.watch_for_stop(), watchdog.start_watchdog(values)
