"""The JobSet manifests: against the models of JobSet and the schemas of Kubernetes."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import yaml
from cloud_tpu import accelerators

RENDER = pathlib.Path(__file__).parents[2] / "launch" / "gke" / "render.py"
spec = importlib.util.spec_from_file_location("launch_render", RENDER)
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)
COMMAND = ["--", "ddpm", "train", "--config=cifar10", "--workdir=gs://b/a b", "$HOME '\"{}:#"]
CASES = {
    "one host": ["--tpu=v6e-8"],
    "slice, spot": ["--tpu=v5litepod-16", "--spot"],
    "multislice": ["--tpu=v5p-16", "--slices=2", "--env=A=1: 2"],
    "tpu7x": ["--tpu=tpu7x-16", "--service-account=trainer", "--namespace=team"],
    "gpu": ["--gpu=nvidia-h100-80gb", "--nodes=4", "--gpus-per-node=8", "--spot"],
}


def manifest(*arguments, capsys):
    assert render.main(["--name=run", "--image=gcr.io/p/ddpm:1", *arguments, *COMMAND]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("case", CASES)
def test_models_of_jobset_know_every_field(case, capsys):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api")
    given = manifest(*CASES[case], capsys=capsys)
    understood = models.JobsetV1alpha2JobSet.from_dict(given).to_dict()
    assert subset(given, understood), difference(given, understood)
    wrong = json.loads(json.dumps(given))
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodeSelectorr"] = {}
    assert not subset(wrong, models.JobsetV1alpha2JobSet.from_dict(wrong).to_dict())


def subset(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and all(k in b and subset(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(subset, a, b))
    return a == b  # a quantity comes back as a float


def difference(a, b, path=""):
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k, v in a.items()
                for d in (difference(v, b[k], f"{path}.{k}") if k in b else [f"{path}.{k}"])]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True))
                for d in difference(x, y, f"{path}[{i}]")]
    return [] if subset(a, b) else [f"{path}: {a} {b}"]


@pytest.mark.parametrize("case", CASES)
def test_the_job_inside_is_valid_kubernetes(case, capsys):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate")
    inner = manifest(*CASES[case], capsys=capsys)["spec"]["replicatedJobs"][0]["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": inner}
    version = validate.latest_version()
    validate.validate(job, version, strict=True)
    inner["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(validate.ValidationError):
        validate.validate(job, version, strict=True)


def test_shape_command_and_codes(capsys):
    given = manifest(*CASES["multislice"], capsys=capsys)["spec"]
    [jobs] = given["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    [box] = pod["containers"]
    assert (jobs["replicas"], job["completions"], job["parallelism"]) == (2, 2, 2)
    assert box["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x2"
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert box["command"] == COMMAND[1:]  # quoting survives YAML
    assert {"name": "A", "value": "1: 2"} in box["env"]
    assert {"name": "DDPM_INIT_TIMEOUT", "value": "3600"} in box["env"]
    codes = job["podFailurePolicy"]["rules"][1]["onExitCodes"]
    from ddpm_jax.parallel import exit_codes
    restart = {exit_codes.EXIT_RESTART, exit_codes.EXIT_LOST, exit_codes.EXIT_HUNG,
               exit_codes.EXIT_UNREACHABLE, 137, 143}
    assert codes["operator"] == "NotIn" and restart <= set(codes["values"])
    assert not {0, 1, 2, 126} & set(codes["values"]) and len(codes["values"]) <= 255
    assert given["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def test_gpu_pods_find_each_other_by_name(capsys):
    given = manifest(*CASES["gpu"], capsys=capsys)["spec"]
    pod = given["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in pod["containers"][0]["env"]}
    assert env["DDPM_COORD"] == "run-train-0-0.run:8476" and env["DDPM_NPROC"] == "4"
    assert "job-completion-index" in env["DDPM_PROC"]["fieldRef"]["fieldPath"]
    assert given["network"]["subdomain"] == "run" and pod["terminationGracePeriodSeconds"] == 25


@pytest.mark.parametrize("arguments, expected", [
    (["--tpu=v5litepod-12"], "comes in sizes"), (["--tpu=v3-8"], "not rendered"),
    (["--tpu=v6e-8", "--name=A"], "lower-case"), (["--tpu=v6e-8", "--env=x"], "NAME=VALUE")])
def test_bad_input(arguments, expected):
    out = subprocess.run([sys.executable, RENDER, "--name=run", "--image=i", *arguments, *COMMAND],
                         capture_output=True, text=True)
    assert out.returncode == 2 and expected in out.stderr.splitlines()[-1] and not out.stdout


def test_sky_example_names_what_exists():
    task = yaml.safe_load((RENDER.parents[1] / "sky" / "train.yaml").read_text())
    name = task["resources"]["accelerators"].removeprefix("tpu-")
    piece = accelerators.parse_accelerator(name)
    assert piece.hosts == 1
    assert task["resources"]["accelerator_args"]["runtime_version"] == piece.tpu.runtime
    for word in ("WORKDIR", "CONFIG"):
        assert f"${word}" in task["run"] and word in task["envs"]
