"""`ddpm`: the table of subcommands and the way into each."""

import functools
import importlib
import sys
from collections.abc import Callable

from absl import flags

from ddpm_jax import __version__
from ddpm_jax.cli import output, start
from ddpm_jax.errors import UserError, did_you_mean

SUBCOMMANDS = {
    "train": ("train", "train a model, or resume the run in --workdir"),
    "sample": ("sample", "draw images from a trained model"),
    "inpaint": ("inpaint", "fill in masked pixels of images with a trained model"),
    "edit": ("edit", "change images: noise them part of the way, then denoise them"),
    "report": ("report", "write the page of a run, RUN/index.html, again"),
    "evaluate": ("evaluate", "FID, IS, KID, precision/recall, bits/dim of a run or of images"),
    "reference": ("reference", "statistics of a dataset's real images, with which FID compares"),
    "reproduce": ("reproduce", "the paper's tables and figures: cost, values, verdict"),
    "inception": ("inception", "convert the Inception weights that FID needs (.pth, .pb, .tgz)"),
    "import": ("import_", "make a run from an official TF1 checkpoint or a diffusers folder"),
    "export": ("export", "write a model as safetensors or as a diffusers folder"),
    "data": ("data", "prepare a dataset once, or describe it"),
    "compile": ("compile", "compile for a TPU or GPU that is not here: does it fit, how fast"),
    "bench": ("bench", "measure the step, sampling, data, evaluation or compilation"),
    "doctor": ("doctor", "check this machine, a pod or a bucket before a run"),
    "completion": ("completion", "print a script that completes commands in bash or zsh"),
}
WITHOUT_JAX = ("completion",)
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
        value = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        default = "" if value in (None, "") else f" (default: {value})"
        print(f"  --{name}: {flag.help}{default}")
    for line in getattr(module, "more_help", list)():
        print(line)


def main(argv: list[str]) -> int:
    """As ``command``, for callers that continue, such as a notebook: restores signal handlers."""
    try:
        return command(argv)
    finally:
        if "ddpm_jax.parallel.stop" in sys.modules:
            sys.modules["ddpm_jax.parallel.stop"].close_all()


def command(argv: list[str]) -> int:
    """Run `argv` (without the program's name); returns the exit code."""
    if argv[:1] == ["help"] and argv[1:]:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help", "--helpfull"):
        print(usage())
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        print(__version__)
        return 0
    try:
        return _subcommand(*argv)() or 0
    except Exception as error:
        known = isinstance(error, (UserError, flags.Error))
        problem = str(error) if known else start.backend_problem(error)
        if problem is None:
            raise
        label = output.coloured("ddpm: error:", output.RED, sys.stderr)
        print(f"{label} {' '.join(problem.split())}", file=sys.stderr)
        return _leave_pod(error)


def _subcommand(name: str, *words: str) -> Callable[[], int | None]:
    """The subcommand with its flags read: a call, which then is near the top of every traceback."""
    if name not in SUBCOMMANDS:
        raise UserError(f"no subcommand {name!r}{did_you_mean(name, SUBCOMMANDS)}; known: "
                        f"{', '.join(SUBCOMMANDS)}")
    words = flags.FlagValues().read_flags_from_files(words)
    asks_for_help = any(a in ("-h", "--help", "-help") for a in words)
    if not asks_for_help and name not in WITHOUT_JAX:
        start.start_jax()
    module, define = definer(name, words)
    if asks_for_help:
        return functools.partial(_print_help, module, define.values)
    return functools.partial(module.main, define.values, define.parse())


def definer(name: str, words=()):
    """-> (the module of a subcommand, a Definer with its flags). Imports no JAX."""
    from ddpm_jax.cli.common import Definer

    module = importlib.import_module(f"ddpm_jax.cli.{SUBCOMMANDS[name][0]}")
    define = Definer(words)
    module.define_flags(define)
    return module, define


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
