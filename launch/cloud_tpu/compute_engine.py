"""Compute Engine (v5p and later): a group of machines, one slice. A row of `steps.APIS`."""

from cloud_tpu import LaunchError
from cloud_tpu.accelerators import parse_accelerator
from cloud_tpu.commands import Command
from cloud_tpu.queued_resources import scope

NEEDS_NAMES = True    # gcloud reaches one machine at a time
GONE = {"STOPPED", "TERMINATED", "SUSPENDED"}
PROVISIONING = {"spot": "SPOT", "reserved": "RESERVATION_BOUND"}


def check(o, piece):
    """Raises LaunchError for what this API does not serve."""
    if piece.tpu.machine is None:
        raise LaunchError(f"--api=gce: {piece.family} is served by the Cloud TPU API only; "
                          "leave --api away")
    if o.slices > 1:
        raise LaunchError("--api=gce: one slice only; several need GKE (launch/gke)")
    if not o.project:
        raise LaunchError("--api=gce: --project is needed")


def _region(o):
    return o.zone.rpartition("-")[0]


def _group(o, what, *words, **options):
    return Command(["gcloud", "compute", "instance-groups", "managed", what, o.name,
                    f"--project={o.project}", *words], check=False, **options)


def describe_command(o, dry):
    hosts = parse_accelerator(o.accelerator).hosts
    running = "".join(f"{o.name}-{i}\tRUNNING\n" for i in range(hosts))
    return _group(o, "list-instances", f"--zone={o.zone}",
                  "--format=value(instance.basename(),instanceStatus)",
                  dry=(1, "NOT_FOUND") if dry == "ABSENT" else (0, running))


def read_state(o, text):
    """Output of describe_command -> (state, names of the running machines)."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    ready = sorted(row[0] for row in rows if row[1:] == ["RUNNING"])
    if len(ready) == parse_accelerator(o.accelerator).hosts:
        return "ACTIVE", ready
    return "LOST" if any(GONE & set(row[1:]) for row in rows) else "WAITING", ready


def create_commands(o):
    """Workload policy, template, group. Each may exist already: that is fine."""
    piece = parse_accelerator(o.accelerator)
    policy = f"projects/{o.project}/regions/{_region(o)}/resourcePolicies/{o.name}"
    template = ["gcloud", "compute", "instance-templates", "create", o.name,
                f"--project={o.project}", f"--machine-type={piece.tpu.machine}",
                "--maintenance-policy=TERMINATE",
                f"--image-family={o.image_family}", f"--image-project={o.image_project}",
                "--scopes=cloud-platform", f"--labels=ddpm={o.name}"]
    if o.provision in PROVISIONING:
        template += [f"--provisioning-model={PROVISIONING[o.provision]}",
                     "--instance-termination-action=DELETE"]
    template += [f"--{flag}={value}" for flag, value in
                 (("network", o.network), ("subnet", o.subnetwork),
                  ("service-account", o.service_account)) if value]
    template += ["--no-address"] if o.internal_ips else []
    return [Command(["gcloud", "compute", "resource-policies", "create", "workload-policy", o.name,
                     f"--project={o.project}", "--type=HIGH_THROUGHPUT",
                     f"--accelerator-topology={piece.topology}", f"--region={_region(o)}"],
                    check=False),
            Command(template, check=False),
            _group(o, "create", f"--size={piece.hosts}", f"--template={o.name}",
                   f"--zone={o.zone}", "--default-action-on-vm-failure=do-nothing",
                   f"--workload-policy={policy}")]


def delete_commands(o):
    project = f"--project={o.project}"
    return [_group(o, "delete", f"--zone={o.zone}", "--quiet"),
            Command(["gcloud", "compute", "instance-templates", "delete", o.name, project,
                     "--quiet"], check=False),
            Command(["gcloud", "compute", "resource-policies", "delete", o.name, project,
                     f"--region={_region(o)}", "--quiet"], check=False)]


def ssh_commands(o, vms, remote: str, worker, **options):
    """`remote` on the worker ("all": every one): one command a machine."""
    return [Command(["gcloud", "compute", "ssh", vm, *scope(o), f"--command={remote}"], **options)
            for vm in (vms if worker == "all" else [vms[int(worker)]])]


def scp_commands(o, vms, source: str, **options):
    """`source` (a folder) to ~/ of every machine."""
    return [Command(["gcloud", "compute", "scp", source, f"{vm}:", *scope(o), "--recurse"],
                    **options) for vm in vms]


def start_words(words: list, env: dict) -> list[str]:
    """Words of `host.sh start`, which reads the port while it works the coordinator out."""
    env = dict(env)
    port = f"JAX_COORDINATOR_PORT={env.pop('JAX_COORDINATOR_PORT')}"
    return [port, *words, "--coordinate", *[f"{k}={v}" for k, v in env.items()]]


def workers_per_ssh(o) -> int:
    return 1
