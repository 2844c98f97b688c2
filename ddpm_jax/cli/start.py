"""Start JAX for a command: without its plugins' messages about absent hardware, and with one line
instead of a traceback or an abort where the environment is wrong."""

import glob
import logging
import os
import re
import resource
import sys
import tempfile
import warnings

from ddpm_jax.compilation.hardware import NO_TPU
from ddpm_jax.errors import UserError

# What the CUDA plugin writes on a machine without a GPU, before any logging can be configured.
NO_GPU = re.compile(rb"before absl::InitializeLog\(\) is called|cudart_stub\.cc.*GPU will not be")


def start_jax() -> None:
    """Import JAX, once. Raises UserError for a JAX_* variable or an XLA flag that it refuses."""
    if "jax" in sys.modules:
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            import jax  # noqa: F401
        except ValueError as error:
            raise UserError(f"JAX refuses a JAX_* variable of the environment: {error}") from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught:
                if _has_gpu() or not NO_GPU.search(line):
                    sys.stderr.write(line.decode(errors="replace"))
    _hide_absent_gpu()
    _answer_for_absent_tpu()
    _check_xla_flags()


def _has_gpu() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def _hide_absent_gpu() -> None:
    """Drop the traceback that JAX logs when the CUDA plugin finds no GPU where there is none."""
    if not _has_gpu():
        logging.getLogger("jax._src.xla_bridge").addFilter(
            lambda record: "jax_plugins.xla_cuda" not in record.getMessage())


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _answer_for_absent_tpu() -> None:
    """Keep libtpu, where it is installed without a TPU, from warning that it knows no metadata.
    JAX has looked for chips too: it sets the variable below where it found none."""
    if not _has_tpu() and os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        for variable, value in NO_TPU.items():
            os.environ.setdefault(variable, value)


def _check_xla_flags() -> None:
    """XLA aborts the process at an unknown flag: parse the flags in a child first."""
    if not os.environ.get("XLA_FLAGS"):
        return
    from jax._src.lib import xla_client

    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads: the child only parses
        child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(writer, 2)
        xla_client.CompileOptions().executable_build_options.debug_options  # noqa: B018
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        unknown = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", text)
        problem = (f"unknown: {unknown[1]}; correct or unset it (--xla_tpu_* belong in "
                   "LIBTPU_INIT_ARGS)" if unknown else "XLA cannot read it; correct or unset it")
        raise UserError(f"XLA_FLAGS={os.environ['XLA_FLAGS']!r}: {problem}")


def backend_problem(error: BaseException) -> str | None:
    """One line for an error that JAX raised while it started its devices; None for any other."""
    wanted = os.environ.get("JAX_PLATFORMS")
    # An absent GPU with its plugin installed is a bare assertion of JAX that there is a backend.
    no_backend = wanted and isinstance(error, AssertionError) and not error.args and getattr(
        sys.modules.get("jax._src.xla_bridge"), "_default_backend", error) is None
    if not no_backend and "Unable to initialize backend" not in str(error):
        return None
    text = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
    return (f"{f'JAX_PLATFORMS={wanted}: ' if wanted else ''}{text or 'no such device here'}; set "
            "JAX_PLATFORMS to cpu, cuda or tpu as this machine has it, or unset it (ddpm doctor "
            "lists the devices)")
