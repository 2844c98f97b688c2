import importlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from ddpm_jax.benchmark import corpus, environments, outputs, scalars

# The platform's schema (google-ml-infra/bap, bap_proto/), the fields that the registry uses.
ENUMS = {"Stat": ["STAT_UNSPECIFIED", "MEAN", "MEDIAN"]}
MESSAGES = {
    "Pair": {"key": "string", "value": "string"},
    "WorkloadAction": {"action": "string", "action_inputs": "Pair*"},
    "StatSpec": {"stat": "Stat"},
    "MetricSpec": {"name": "string", "unit": "string", "stats": "StatSpec*"},
    "EnvironmentConfig": {"id": "string", "runner_label": "string", "container_image": "string",
                          "workload_action_inputs": "Pair*", "tags": "string*"},
    "BenchmarkConfig": {"name": "string", "description": "string", "owner": "string",
                        "workload": "WorkloadAction", "metrics": "MetricSpec*",
                        "environment_configs": "EnvironmentConfig*", "tags": "string*"},
    "BenchmarkSuite": {"benchmarks": "BenchmarkConfig*"},
}


def suite():
    """An empty BenchmarkSuite."""
    file = descriptor_pb2.FileDescriptorProto(name="registry_of_test.proto", package="bap",
                                              syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            made = message.field.add(name=field, number=number)
            made.label = made.LABEL_REPEATED if kind.endswith("*") else made.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            made.type = {"string": made.TYPE_STRING, "Stat": made.TYPE_ENUM}.get(
                kind, made.TYPE_MESSAGE)
            if kind != "string":
                made.type_name = f".bap.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bap.BenchmarkSuite"))()


def test_the_registry_is_one_of_the_platform():
    entries = [e._asdict() for e in corpus.ENTRIES]
    found = text_format.Parse(outputs.registry(entries), suite())
    names = [b.name for b in found.benchmarks]
    assert names == [f"{e.name}_compile" for e in corpus.ENTRIES if "cpu" in e.targets]
    first = found.benchmarks[0]
    assert {m.name for m in first.metrics} == set(scalars.READ)
    assert all(m.stats and m.unit for m in first.metrics)
    inputs = {i.key: i.value for i in first.workload.action_inputs}
    assert os.path.samefile(environments.ROOT / inputs["script_path"], scalars.__file__)
    assert inputs["runtime_flags"].endswith(f"{corpus.ENTRIES[0].name}.mlir.bc")


@pytest.mark.slow
def test_scalars_of_a_compilation(tmp_path):
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((4, 4), jnp.float32))
    file = tmp_path / "square.mlir.bc"
    file.write_bytes(corpus.artifact(lowered))
    words = [sys.executable, scalars.__file__, "--repeat=1", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "TENSORBOARD_OUTPUT_DIR" in done.stderr
    environment = {**os.environ, "TENSORBOARD_OUTPUT_DIR": str(tmp_path / "out")}
    subprocess.run(words, check=True, env=environment)
    [events] = (tmp_path / "out").iterdir()
    event = importlib.import_module("tensorboardX.proto.event_pb2").Event
    content, at, values = events.read_bytes(), 0, {}
    while at < len(content):  # records: length, its checksum, content, its checksum
        length = int.from_bytes(content[at:at + 8], "little")
        for value in event.FromString(content[at + 12:at + 12 + length]).summary.value:
            values[value.tag] = value.simple_value
        at += 16 + length
    assert set(values) == set(scalars.READ) == set(outputs.SCALARS)
    assert all(v > 0 for v in values.values())


def test_github_action_format():
    row = {"cell": "c", "jaxpr_equations": 1, "stablehlo": {"instructions": 2},
           "hlo": {"instructions": 3, "kernels": 4, "bytes": 5, "copies": 0, "transposes": 0,
                   "collectives": {}},
           "memory": {"peak": 6}, "executable_bytes": None,
           "seconds": {s: {"cpu_s": 7.0} for s in ("trace", "lower", "compile")}, "warm": None,
           "repeats": {"metrics": {"kernels": [4, 5], "peak memory": [6, 6]}}}
    found = {e["name"]: e for e in outputs.github_action([row, {"cell": "x", "error": "no"}])}
    assert found["c: kernels"] == {"name": "c: kernels", "unit": "count", "value": 4,
                                   "range": "4 to 5"}
    assert found["c: peak memory"] == {"name": "c: peak memory", "unit": "bytes", "value": 6}
    assert found["c: trace CPU seconds"]["unit"] == "CPU s" and "c: executable bytes" not in found
