"""Print a JobSet that runs one command on TPU slices or GPU nodes of a GKE cluster.

    python launch/gke/render.py --name=cifar --image=IMAGE --tpu=v5litepod-16 --slices=2 --spot \\
        -- ddpm train --config=cifar10 --workdir=gs://BUCKET/cifar | kubectl apply -f -
    python launch/gke/render.py --name=lsun --image=IMAGE --gpu=nvidia-h100-80gb --nodes=4 \\
        --gpus-per-node=8 -- ddpm train ... | kubectl apply -f -

The cluster needs JobSet (kubectl apply --server-side -f
https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml) and a node pool
per slice; launch/README.md has the commands.
"""

import argparse
import json
import pathlib
import re
import string
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cloud_tpu import LaunchError  # noqa: E402
from cloud_tpu.accelerators import TPUS, parse_accelerator  # noqa: E402

RESTART_CODES = [42, *range(127, 256)]


def parse(argv):
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="render.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", required=True)
    add("--image", required=True, help="container image with ddpm in it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tpu", help="accelerator, as v5litepod-16")
    what.add_argument("--gpu", help="label cloud.google.com/gke-accelerator, as nvidia-h100-80gb")
    add("--slices", type=int, default=1, help="with --tpu")
    add("--nodes", type=int, default=1, help="with --gpu")
    add("--gpus-per-node", type=int, default=8)
    add("--spot", action="store_true")
    add("--max-restarts", type=int, default=100)
    add("--namespace", default="default")
    add("--service-account", default="default", help="of Kubernetes, with access to the bucket")
    add("--port", type=int, default=8476)
    add("--env", action="append", default=[], metavar="K=V")
    o = parser.parse_args(argv[:at])
    o.command = argv[at + 1:]
    if not o.command:
        parser.error("no command: put it after --, as in: -- ddpm train ...")
    # Pods are named NAME-train-SLICE-HOST, and host names end at 63 letters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", o.name):
        parser.error(f"--name={o.name}: lower-case letters, digits and -, at most 40")
    if o.slices < 1 or o.nodes < 1 or o.gpus_per_node < 1 or o.max_restarts < 0:
        parser.error("--slices, --nodes and --gpus-per-node must be at least 1")
    for pair in o.env:
        if not re.match(r"[A-Za-z_]\w*=", pair):
            parser.error(f"--env={pair}: expected NAME=VALUE")
    return o, parser


def values(o, parser) -> dict:
    """The values of the template's ${names}. None: the line is left out."""
    env = {"JAX_COORDINATOR_PORT": str(o.port), "PYTHONUNBUFFERED": "1"}
    if o.tpu:
        try:
            piece = parse_accelerator(o.tpu)
        except LaunchError as error:
            parser.error(f"--tpu: {error}")
        if piece.tpu.gke is None:
            known = ", ".join(name for name, tpu in TPUS.items() if tpu.gke)
            parser.error(f"--tpu={o.tpu}: not rendered; known: {known}")
        accelerator, topology, hosts = piece.tpu.gke, piece.topology, piece.hosts
        chips = piece.chips // piece.hosts
        if o.slices > 1:
            env["DDPM_INIT_TIMEOUT"] = "3600"  # the slices come one by one
    else:
        accelerator, topology, hosts, chips = o.gpu, None, o.nodes, o.gpus_per_node
        env["DDPM_COORD"] = f"{o.name}-train-0-0.{o.name}:{o.port}"
        env["DDPM_NPROC"] = str(hosts)
    env.update(pair.split("=", 1) for pair in o.env)
    entries = [{"name": k, "value": v} for k, v in env.items()]
    if not o.tpu:
        entries.append({"name": "DDPM_PROC", "valueFrom": {"fieldRef": {
            "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}})
    return dict(
        name=o.name, namespace=o.namespace, image=o.image, service_account=o.service_account,
        max_restarts=o.max_restarts, slices=o.slices, hosts=hosts, chips=chips, port=o.port,
        accelerator=accelerator, topology=topology, spot="true" if o.spot else None,
        grace=25 if o.spot else 120,  # GKE gives a spot node no more
        restart_codes=RESTART_CODES, command=o.command, env=entries)


def render(template: str, fields: dict) -> str:
    """Fills ${name} in with JSON, which YAML contains; drops the lines whose value is None."""
    lines = []
    for line in template.splitlines():
        names = re.findall(r"\$\{(\w+)\}", line)
        if any(fields[name] is None for name in names):
            continue
        lines.append(string.Template(line).substitute(
            {name: json.dumps(fields[name]) for name in names}))
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    o, parser = parse(sys.argv[1:] if argv is None else argv)
    template = (HERE / ("tpu.yaml.tmpl" if o.tpu else "gpu.yaml.tmpl")).read_text()
    sys.stdout.write(render(template, values(o, parser)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
