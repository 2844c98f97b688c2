"""The Cloud TPU API (v2 to v6e): one queued resource, one node a slice. A row of `steps.APIS`."""

from cloud_tpu import LaunchError
from cloud_tpu.accelerators import parse_accelerator
from cloud_tpu.commands import Command

NEEDS_NAMES = False   # the machines' names are not needed: gcloud reaches all workers of a node
STATES = {"ACTIVE": "ACTIVE", "FAILED": "FAILED", "SUSPENDED": "LOST", "SUSPENDING": "LOST",
          "DELETING": "LOST"}  # all others: WAITING


def check(o, piece):
    """Raises LaunchError for what this API does not serve."""
    if piece.tpu.runtime is None:
        raise LaunchError(f"{o.accelerator}: the Cloud TPU API does not serve it; use --api=gce, "
                          "or GKE (launch/gke)")


def scope(o) -> list[str]:
    return [f"--zone={o.zone}"] + ([f"--project={o.project}"] if o.project else [])


def nodes(o) -> list[str]:
    """Names of the TPU nodes, one a slice."""
    return [o.name] if o.slices == 1 else [f"{o.name}-{i}" for i in range(o.slices)]


def describe_command(o, dry):
    return Command(["gcloud", "compute", "tpus", "queued-resources", "describe", o.name, *scope(o),
                    "--format=value(state.state,tpu.nodeSpec[0].node.acceleratorType)"],
                   dry=(1, "NOT_FOUND") if dry == "ABSENT" else (0, f"{dry}\t{o.accelerator}"),
                   check=False)


def read_state(o, text):
    """Output of describe_command -> (state, names of machines: none are needed)."""
    state, *kind = text.split()
    if kind and kind[0] != o.accelerator:
        raise LaunchError(f"--name={o.name} is taken: it has a {kind[0]}, not {o.accelerator}; "
                          "choose another name, or delete it")
    return STATES.get(state, "WAITING"), []


def create_commands(o):
    argv = ["gcloud", "compute", "tpus", "queued-resources", "create", o.name, *scope(o),
            f"--accelerator-type={o.accelerator}", f"--runtime-version={o.runtime_version}"]
    argv += ([f"--node-id={o.name}"] if o.slices == 1
             else [f"--node-count={o.slices}", f"--node-prefix={o.name}"])
    if o.provision != "on-demand":
        argv.append(f"--{o.provision}")
    argv += [f"--{flag}={value}" for flag, value in
             (("network", o.network), ("subnetwork", o.subnetwork)) if value]
    argv += ["--internal-ips"] if o.internal_ips else []
    argv += [f"--service-account={o.service_account}"] if o.service_account else []
    argv += ["--scopes=https://www.googleapis.com/auth/cloud-platform", f"--labels=ddpm={o.name}"]
    return [Command(argv, check=False)]


def delete_commands(o):
    return [Command(["gcloud", "compute", "tpus", "queued-resources", "delete", o.name, *scope(o),
                     "--force", "--quiet"], check=False)]


def ssh_commands(o, vms, remote: str, worker, **options):
    """`remote` on the worker ("all": every one): one command a slice."""
    many = [f"--batch-size={o.ssh_parallelism}"] if o.ssh_parallelism else []
    base = ["gcloud", *(["alpha"] if many else []), "compute", "tpus", "tpu-vm", "ssh"]
    return [Command([*base, node, *scope(o), f"--worker={worker}", f"--command={remote}", *many],
                    **options)
            for node in (nodes(o) if worker == "all" else nodes(o)[:1])]


def scp_commands(o, vms, source: str, **options):
    """`source` (a folder) to ~/ of every worker."""
    return [Command(["gcloud", "compute", "tpus", "tpu-vm", "scp", source, f"{node}:", *scope(o),
                     "--worker=all", "--recurse"], **options) for node in nodes(o)]


def start_words(words: list, env: dict) -> list[str]:
    """Words of `host.sh start`."""
    return [*words, *[f"{k}={v}" for k, v in env.items()]]


def workers_per_ssh(o) -> int:
    return parse_accelerator(o.accelerator).hosts
