"""`ddpm`: the table of subcommands and the way into each."""

import importlib
import sys

from absl import flags

from ddpm_jax import __version__
from ddpm_jax.cli import output
from ddpm_jax.errors import UserError

SUBCOMMANDS = {
    "train": ("train", "train a model, or continue the run in --workdir"),
    "sample": ("sample", "draw images from a trained model"),
    "evaluate": ("evaluate", "FID, IS, KID, precision/recall, bits/dim of a model or of images"),
    "reference": ("reference", "statistics of a dataset's real images, for evaluate"),
    "reproduce": ("reproduce", "the paper's tables and figures: config, cost, band, verdict"),
    "inception": ("inception", "convert the Inception-2015 weights (.pth, .pb, .tgz) to .npz"),
    "import": ("import_", "read the official TF1 checkpoints or a diffusers folder"),
    "export": ("export", "write safetensors or a diffusers folder"),
    "data": ("data", "prepare a dataset once, or describe it"),
    "compile": ("compile", "compile for a TPU or GPU that is not there, and report"),
    "bench": ("bench", "measure the step, sampling, data, evaluation or compilation"),
    "doctor": ("doctor", "check this machine, a pod or a bucket before a run"),
}
USER_ERROR = 2


def usage() -> str:
    lines = [f"ddpm {__version__}: Denoising Diffusion Probabilistic Models in JAX", "",
             "usage: ddpm <subcommand> [flags]   (ddpm <subcommand> --help explains one)", ""]
    lines += [f"  {name:<10} {text}" for name, (_, text) in SUBCOMMANDS.items()]
    return "\n".join(lines)


def _print_help(module, values) -> None:
    print((module.__doc__ or "").strip() + "\n\nflags:")
    for name in values:
        flag = values[name]
        default = "" if flag.default in (None, "") else f" (default: {flag.default})"
        print(f"  --{name}: {flag.help}{default}")


def main(argv: list[str]) -> int:
    """`command` for programs that go on afterwards, a notebook say: signals are given back."""
    try:
        return command(argv)
    finally:
        if "ddpm_jax.parallel.stop" in sys.modules:
            sys.modules["ddpm_jax.parallel.stop"].close_all()


def command(argv: list[str]) -> int:
    """Run `argv` (without the program's name); returns the exit status."""
    if not argv or argv[0] in ("-h", "--help", "help", "--helpfull"):
        print(usage())
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in SUBCOMMANDS:
        print(f"ddpm: error: no subcommand {name!r}; known: {', '.join(SUBCOMMANDS)}",
              file=sys.stderr)
        return USER_ERROR
    module = importlib.import_module(f"ddpm_jax.cli.{SUBCOMMANDS[name][0]}")
    from ddpm_jax.cli.common import Definer  # after --help, which needs no JAX

    try:
        rest = flags.FlagValues().read_flags_from_files(rest)
        define = Definer(rest)
        module.define_flags(define)
        if any(a in ("-h", "--help", "-help") for a in rest):
            _print_help(module, define.values)
            return 0
        return module.main(define.values, _parse(define.values, rest)) or 0
    except (UserError, flags.Error) as error:
        print(f"ddpm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _leave_pod(error)


def _leave_pod(error: BaseException) -> int:
    """Exit status of bad input; in a pod, ends the process rather than wait 300 s for the others.
    A save that failed because a peer was lost ends with EXIT_LOST (restart)."""
    exit_codes = sys.modules.get("ddpm_jax.parallel.exit_codes")
    if exit_codes is None:
        return USER_ERROR
    lost = error.__cause__ is not None and exit_codes.is_lost_peer(error.__cause__)
    code = exit_codes.EXIT_LOST if lost and exit_codes.in_pod() else USER_ERROR
    exit_codes.leave(code)
    return code


def _parse(values, words: list[str]) -> list[str]:
    """Read the flags; -> what is no flag. A wrong config field is a UserError."""
    try:
        return values(["ddpm", *words])[1:]
    except (AttributeError, KeyError) as error:
        field = str(error.args[0]).replace("\\n", "\n").splitlines()[0].strip("\\'\"")
        raise UserError(f"config has no field {field!r}; the fields and their defaults are in "
                        "configs/default.py") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"in --config: {error}") from None


def run() -> None:
    """Entry point of the console script."""
    output.keep_writable()
    try:
        code = command(sys.argv[1:])
    except KeyboardInterrupt:  # before or without a `Stop`, which saves
        from ddpm_jax.parallel.exit_codes import EXIT_INTERRUPTED, leave

        print("ddpm: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
        leave(code)
    sys.exit(code)
