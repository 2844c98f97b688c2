"""Results in the formats that others read: github-action-benchmark, XLA's benchmark registry and
the folder of HLO that XLA's hlo_benchmark_test takes."""

import pathlib

from ddpm_jax.benchmark import corpus, history_page, repeats
from ddpm_jax.storage import files

REGISTRY, LIST = "benchmark_registry.pbtxt", "hlo_files.bzl"
# What scalars.py writes for each compilation: tag -> unit.
SCALARS = {"compile_cpu_seconds": "s", "compile_wall_seconds": "s", "hlo_instructions": "count",
           "executable_bytes": "bytes", "peak_rss_bytes": "bytes"}
IMAGE = "us-docker.pkg.dev/ml-oss-artifacts-published/ml-public-container/ml-build:latest"
UNITS = {"CPU seconds": "CPU s", "bytes": "bytes", "memory": "bytes"}


def _unit(name: str) -> str:
    return next((unit for words, unit in UNITS.items() if words in name), "count")


def github_action(rows: list[dict]) -> list[dict]:
    """Rows of `ddpm bench compile` for github-action-benchmark, tool customSmallerIsBetter."""
    out = []
    for row in rows:
        if "error" in row:
            continue
        measured = row.get("repeats", {}).get("metrics", {})
        for name, metric in repeats.METRICS.items():
            value = metric.read(row)
            if value is None:
                continue
            entry = {"name": f"{row['cell']}: {name}", "unit": _unit(name), "value": value}
            if name in measured and measured[name][0] != measured[name][1]:
                entry["range"] = "{:g} to {:g}".format(*measured[name])
            out.append(entry)
    return out


def github_action_of_history(rows: list[dict], kind: str) -> list[dict]:
    """The newest release of each program of a history, for the same tool: ratios."""
    out = []
    for name, by_release in history_page.points(rows, kind).items():
        good = [(release, p) for release, p in by_release.items() if p.ratio is not None]
        if good:
            release, point = good[-1]
            out.append({"name": f"{kind}: {name}", "unit": "ratio to the reference",
                        "value": round(point.ratio, 4), "extra": f"release {release}"})
    return out


def _benchmark(entry: dict) -> str:
    """A block of the registry for one program. The reader fills in owner, baselines, image."""
    metrics = "\n".join(f"""  metrics {{
    name: "{name}"
    unit: "{unit}"
    stats {{ stat: MEDIAN }}
  }}""" for name, unit in SCALARS.items())
    return f"""benchmarks {{
  name: "{entry['name']}_compile"
  description: "Compiles {entry['name']}.mlir.bc (StableHLO, VHLO bytecode) for one CPU device."
  owner: "ddpm_jax"
  tags: "compile-time"
  workload {{
    action: "./ml_actions/benchmarking/actions/workload_executors/python"
    action_inputs {{ key: "script_path" value: "ddpm_jax/benchmark/scalars.py" }}
    action_inputs {{ key: "python_version" value: "3.13" }}
    action_inputs {{ key: "project_path" value: "." }}
    action_inputs {{
      key: "runtime_flags"
      value: "--repeat=3 benchmarks/corpus/{entry['name']}.mlir.bc"
    }}
  }}
  environment_configs {{
    id: "cpu_x86"
    runner_label: "linux-x86-n2-16"
    container_image: "{IMAGE}"
    tags: "nightly"
  }}
{metrics}
}}
"""


def registry(entries: list[dict]) -> str:
    """benchmark_registry.pbtxt for the programs of a manifest that are for a CPU."""
    return "\n".join(_benchmark(e) for e in entries if "cpu" in e["targets"])


def xla_folder(source, folder) -> list[str]:
    """Write the HLO of a corpus, XLA's list of it and a registry into a new ``folder``.

    The .hlo files must be in ``source`` (ddpm bench corpus writes them). -> names of the files.
    """
    source, entries = pathlib.Path(source), corpus.read(source)
    wanted = [e for e in entries if "cpu" in e["targets"]]
    with files.new_folder(folder) as out:
        for entry in wanted:
            name = f"{entry['name']}.hlo"
            files.write_bytes(pathlib.Path(out) / name, files.read_bytes(source / name))
        lines = "".join(f'    "{e["name"]}.hlo",\n' for e in wanted)
        files.write_bytes(pathlib.Path(out) / LIST, f"DDPM_HLO_FILES = [\n{lines}]\n".encode())
        files.write_bytes(pathlib.Path(out) / REGISTRY, registry(entries).encode())
    return [*(f"{e['name']}.hlo" for e in wanted), LIST, REGISTRY]
