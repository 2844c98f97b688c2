"""Compile one file with whatever jaxlib is installed and print what it cost as one line of JSON.

  python replay.py PROGRAM.mlir.bc                      a portable StableHLO artifact, for this CPU
  python replay.py PROGRAM.hlo                          HLO text, read by way of StableHLO
  python replay.py PROGRAM.mlir.bc --target=h100 --plugin=.../xla_cuda_plugin.so --gpu=h100.txtpb
  python replay.py PROGRAM.mlir.bc --target=v5e --plugin=.../libtpu.so
  python replay.py PROGRAM.mlir.bc --timeout=600 --memory_gb=16

It needs Python and jaxlib (0.4.34 ... 0.12) with what that imports, and neither JAX nor this
package. The compiler runs in a process of its own: one that hangs, aborts or takes too much memory
is a line too. 'outcome' is ok, error (an exception: 'message'), timeout or killed (by a signal:
'message' names it). Seconds are wall and CPU of all the process's threads and children. With
--optimized=FILE the optimised HLO is written too.
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

BYTECODE = b"ML\xefR"  # how MLIR's begins
V5E = {"topology": "v5e:1x1", "chips_per_host_bounds": [1, 1, 1]}
# An absent GPU cannot be measured on, and releases before 0.8 insist on it. A v5e's compiler takes
# 40 s at O0 (9) and did not end in 400 s at its default.
OPTIONS = {"h100": ["xla_gpu_autotune_level=0"], "v5e": ["optimization_level=9"]}
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1",
         "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
         "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3"}


def _summary(text: str) -> dict:
    """Counts and fingerprint of the optimised HLO, by this project's reader, one file; None each
    without a text."""
    if not text:
        return dict.fromkeys(("instructions", "fusions", "kernels", "optimized"))
    file = pathlib.Path(__file__).resolve().parent.parent / "compilation/hlo.py"
    spec = importlib.util.spec_from_file_location("hlo", file)
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    found = reader.summary(text)
    return {**{key: found[key] for key in ("instructions", "fusions", "kernels")},
            "optimized": reader.fingerprint(text)}


def _clock():
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF,
                                                         resource.RUSAGE_CHILDREN))
    return (time.perf_counter(),
            own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime)


def _since(start) -> dict:
    wall, cpu = (b - a for a, b in zip(start, _clock(), strict=True))
    return {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4)}


def _read(extension, content: bytes):
    """The module in the form that the client of the same release compiles."""
    if content.lstrip().startswith(b"HloModule"):
        module = _of_jaxlib("hlo_module_from_text")(content.decode())
        computation = _of_jaxlib("XlaComputation")(module.as_serialized_hlo_module_proto())
        return extension.mlir.xla_computation_to_mlir_module(computation)
    if not content.startswith(BYTECODE):
        raise ValueError("neither a portable StableHLO artifact (.mlir.bc) nor HLO text (.hlo)")
    try:
        return extension.mlir.deserialize_portable_artifact(content)
    except RuntimeError:  # since 0.11 or 0.12 it wants a context, and returns a module of it
        with _context():
            return extension.mlir.deserialize_portable_artifact(content)


def _context():
    """An MLIR context that knows what the artifacts consist of."""
    from jaxlib.mlir import ir
    from jaxlib.mlir._mlir_libs import _jax_mlir_ext
    from jaxlib.mlir.dialects import chlo, stablehlo

    context, registry = ir.Context(), ir.DialectRegistry()
    _jax_mlir_ext.register_dialects(registry)
    context.append_dialect_registry(registry)
    context.load_all_available_dialects()
    for dialect in (stablehlo, chlo):
        dialect.register_dialect(context)
    return context


def _parsed(text):
    """The module of a text, for clients that take no text: those of absent devices before 0.10."""
    from jaxlib.mlir import ir

    with _context():
        return ir.Module.parse(text)


def _of_jaxlib(name: str):
    """A name of the HLO library, which newer releases have in a module of its own."""
    try:
        return getattr(importlib.import_module("jaxlib._hlo"), name)
    except (ImportError, AttributeError):
        from jaxlib import xla_client

        return getattr(getattr(xla_client, "_xla"), name)  # noqa: B009


def _topology(client, arguments):
    """The device description that an accelerator's compiler takes."""
    if arguments.target == "v5e":
        name, options = V5E["topology"], {"chips_per_host_bounds": V5E["chips_per_host_bounds"]}
        platform_name = "tpu"
    else:
        name, platform_name = "h100:1", "cuda"
        options = {"topology": "1x1x1",
                   "target_config": pathlib.Path(arguments.gpu).read_text()}
    api = client.load_pjrt_plugin_dynamically(platform_name, arguments.plugin)
    if not client.pjrt_plugin_initialized(platform_name):
        client.initialize_pjrt_plugin(platform_name)
    if platform_name == "tpu":
        return client.make_tfrt_tpu_c_api_device_topology(name, **options)
    return client.make_c_api_device_topology(api, name, **options)


def _compiler(arguments, client, extension):
    """-> compile(module) -> executable, for the target."""
    options = client.CompileOptions()
    if arguments.target == "cpu":
        cpu = client.make_cpu_client()
        if not hasattr(cpu, "compile_and_load"):  # before 0.6.1
            return lambda module: cpu.compile(module, options)
        try:
            devices = extension.DeviceList(tuple(cpu.local_devices()[:1]))
            return lambda module: cpu.compile_and_load(module, devices, options)
        except AttributeError:
            return lambda module: cpu.compile_and_load(module, cpu.local_devices()[:1], options)
    overrides = dict(option.split("=", 1) for option in arguments.option)
    if "optimization_level" in overrides:
        options.executable_build_options.optimization_level = int(
            overrides.pop("optimization_level"))
    options.env_option_overrides = list(overrides.items())
    devices = _topology(client, arguments)._make_compile_only_devices()[:1]
    backend = devices[0].client

    def compile(module):
        chosen = extension.DeviceList(tuple(devices)), options
        for arguments in (lambda: (module, *chosen), lambda: (module, options),
                          lambda: (module.encode(), *chosen)):
            with contextlib.suppress(TypeError):
                return backend.compile(*arguments())
        return backend.compile(_parsed(module), *chosen)

    return compile


def _text(executable) -> str:
    """The optimised HLO; empty where a release has it not for an absent device (before 0.8)."""
    try:
        return "\n\n".join(m.to_string() for m in executable.hlo_modules())
    except Exception as error:  # each release raises a type of its own
        if "GetHloModules is not supported" not in str(error):
            raise
        return ""


def _executable_bytes(executable, compiler_client):
    for serialize in (lambda: executable.serialize(),
                      lambda: compiler_client.serialize_executable(executable)):
        try:
            return len(serialize())
        except Exception:  # each release raises a type of its own
            continue
    return None


def _memory(executable) -> dict:
    """XLA's own figures, bytes; None where a release has no such figure."""
    try:
        found = executable.get_compiled_memory_stats()
    except Exception:  # not in every release or backend
        found = None
    kinds = {"peak": "peak_memory_in_bytes", "temp": "temp_size_in_bytes",
             "argument": "argument_size_in_bytes", "output": "output_size_in_bytes"}
    return {kind: getattr(found, name, None) for kind, name in kinds.items()}


def _child(arguments) -> dict:
    """Compile in this process."""
    start = _clock()
    import jaxlib
    from jaxlib import xla_client as client

    extension = getattr(client, "_xla")  # noqa: B009 - pybind's module, by its name in 0.4 and 0.12
    row = {"jaxlib": jaxlib.version.__version__, "python": platform.python_version(),
           "options": arguments.option, "import": _since(start)}
    content = pathlib.Path(arguments.file).read_bytes()
    compile = _compiler(arguments, client, extension)
    start = _clock()
    module = _read(extension, content)
    row["read"] = _since(start)
    start = _clock()
    executable = compile(module)
    row["compile"] = _since(start)
    text = _text(executable)
    if arguments.optimized:
        pathlib.Path(arguments.optimized).write_text(text)
    return {**row, "outcome": "ok", **_summary(text),
            "executable_bytes": _executable_bytes(
                executable, getattr(executable, "client", None)),
            "memory": _memory(executable)}


def _report(arguments) -> int:
    """What the process of its own does: a row, or an exception as a row, into --child's file."""
    if arguments.memory_gb:
        limit = int(arguments.memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        row = _child(arguments)
    except Exception as error:  # of the compiler: it is the result
        row = {"outcome": "error",
               "message": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    row["maxrss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pathlib.Path(arguments.child).write_text(json.dumps(row))
    return 0


def cpu_model() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor()


def load() -> float:
    return round(os.getloadavg()[0], 1)


def measure(file, *, python=sys.executable, target="cpu", timeout=900.0, environment=None,
            options=()) -> dict:
    """Compile ``file`` in a process of ``python`` and return its row, whatever becomes of it.

    environment: variables beside this process's, PYTHONPATH with a jaxlib; options: further flags.
    """
    file = pathlib.Path(file).resolve()
    row = {"schema": 1, "file": file.name,
           "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "target": target,
           "machine": platform.machine(), "cpus": os.cpu_count(), "cpu": cpu_model(),
           "load": load(),
           "XLA_FLAGS": (environment or os.environ).get("XLA_FLAGS", "")}
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "row.json")
        variables = {**os.environ, **QUIET, **(environment or {})}
        if variables.get("PYTHONPATH"):  # the process has another working directory
            variables["PYTHONPATH"] = os.pathsep.join(
                map(os.path.abspath, variables["PYTHONPATH"].split(os.pathsep)))
        words = [str(python), __file__, str(file), f"--target={target}", f"--child={out}", *options]
        start = _clock()
        process = subprocess.Popen(
            words, env=variables, cwd=folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=timeout)
            found = _ending(process.returncode, errors, out)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found = {"outcome": "timeout", "message": f"killed after {timeout:g} s"}
        return {**row, **found, "process": _since(start)}


def _ending(code: int, errors: bytes, out: pathlib.Path) -> dict:
    if code == 0 and out.exists():
        return json.loads(out.read_text())
    last = [line for line in errors.decode(errors="replace").splitlines() if line.strip()][-1:]
    if code < 0:
        name = signal.Signals(-code).name
        return {"outcome": "killed", "message": " ".join([name, *last])[:300]}
    return {"outcome": "error", "message": " ".join([f"exit status {code}", *last])[:300]}


def existing_file(text: str) -> str:
    """For argparse: the absolute path of a file that can be read."""
    try:
        with open(text, "rb"):
            return os.path.abspath(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None


def new_file(text: str) -> str:
    """For argparse: the absolute path of a file that can be written."""
    path = os.path.abspath(text)
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path)):
        raise argparse.ArgumentTypeError(f"{text} is not the name of a file in a folder")
    return path


def positive(text: str) -> float:
    """For argparse."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=existing_file)
    parser.add_argument("--target", default="cpu", choices=("cpu", "h100", "v5e"))
    parser.add_argument("--plugin", type=existing_file,
                        help="the accelerator's PJRT plugin, a shared library")
    parser.add_argument("--gpu", type=existing_file,
                        help="h100: the description of the GPU, a target config")
    parser.add_argument("--option", action="append", metavar="NAME=VALUE", help="an option of an "
                        f"accelerator's compiler; may be repeated; default: {OPTIONS}")
    parser.add_argument("--timeout", type=positive, default=900.0, help="seconds")
    parser.add_argument("--memory_gb", type=positive, help="limit of the process, GiB")
    parser.add_argument("--optimized", type=new_file, help="write the optimised HLO to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    missing = [flag for flag, targets in (("plugin", ("h100", "v5e")), ("gpu", ("h100",)))
               if arguments.target in targets and not getattr(arguments, flag)]
    arguments.option = arguments.option or OPTIONS.get(arguments.target, [])
    wrong = [o for o in arguments.option if not o.partition("=")[2]]
    if wrong or arguments.option and arguments.target == "cpu":
        parser.error(f"--option={wrong[0]} is not NAME=VALUE" if wrong else
                     "--option is for --target=h100 and v5e; XLA_FLAGS reach a CPU's compiler")
    if missing:
        parser.error(f"--target={arguments.target} needs --{' and --'.join(missing)}")
    if arguments.child:
        return _report(arguments)
    options = [f"--{name}={getattr(arguments, name)}" for name in
               ("plugin", "gpu", "memory_gb", "optimized") if getattr(arguments, name)]
    options += [f"--option={option}" for option in arguments.option]
    row = measure(arguments.file, target=arguments.target, timeout=arguments.timeout,
                  options=options)
    print(json.dumps(row))
    return row["outcome"] != "ok"


if __name__ == "__main__":
    sys.exit(main())
