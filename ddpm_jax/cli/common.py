"""Flags that several subcommands share, and what they do before a device is touched."""

import hashlib
import json
import sys

import jax
from absl import flags
from ml_collections import config_flags

from ddpm_jax.compilation.cache import enable_compilation_cache
from ddpm_jax.config import config_path, packaged_configs, to_json
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import hosts, pod, stop, watchdog

FLAGS = flags.FLAGS


def define_config_flag() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "a config file, or the name of a packaged one "
        f"({', '.join(packaged_configs())}); fields: --config.train.steps=1000")


def define_workdir_flag() -> None:
    flags.DEFINE_string("workdir", None, "folder of the run (a path, or gs://bucket/path)")


def define_weights_flags() -> None:
    flags.DEFINE_integer("step", None, "checkpoint to read; default: the newest")
    flags.DEFINE_bool("ema", True, "the averaged weights; --noema: the raw ones")


def required(name: str):
    value = getattr(FLAGS, name)
    if value is None or value == "":
        raise UserError(f"--{name} is missing")
    return value


def no_positionals(argv) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags start with --")


def with_packaged_configs(argv: list[str]) -> list[str]:
    """--config=NAME of a packaged config becomes its path."""
    out = []
    for i, word in enumerate(argv):
        if word.startswith(("--config=", "-config=")):
            word = f"--config={config_path(word.partition('=')[2])}"
        elif i and argv[i - 1] in ("--config", "-config"):
            word = config_path(word)
        out.append(word)
    return out


def join(config=None):
    """Cache, pod, agreement of the hosts: before anything touches a device. -> (stop, watchdog)"""
    cache = enable_compilation_cache()
    pod.initialize()
    facts = {}
    if config is not None:
        text = json.dumps(to_json(config), sort_keys=True)
        facts["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    hosts.check_same_everywhere(facts)
    if jax.process_index() == 0:
        print(f"compilation cache: {cache or 'off'}", file=sys.stderr)
    return stop.watch_for_stop(), watchdog.start_watchdog()
