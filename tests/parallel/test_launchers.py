import os

from ddpm_jax.parallel import launchers


def test_slurm_is_detected(clean_env):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
                        "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
                        "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}.items():
        clean_env.setenv(name, value)
    found, ids = launchers.detect(None, 5)
    assert found == (1, 2, f"n1:{61440 + 7}", "slurm") and ids == [0]
    clean_env.setenv("SLURM_GPUS_ON_NODE", "4")  # one task a node: all four
    assert launchers.detect(9000, 5) == ((1, 2, "n1:9000", "slurm"), [0, 1, 2, 3])
    clean_env.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert launchers.detect(None, 5)[1] == [0]



def test_gke_tpu_slice_needs_no_metadata_server(clean_env):
    from jax._src.clusters import cloud_tpu_cluster
    clean_env.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    clean_env.setenv("TPU_SKIP_MDS_QUERY", "1")
    clean_env.setenv("GCE_METADATA_IP", "127.0.0.1:1")  # would raise at once if asked
    clean_env.setenv("TPU_WORKER_HOSTNAMES", "127.0.0.1,w1,w2")
    clean_env.setenv("TPU_WORKER_ID", "2")
    clean_env.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    found, ids = launchers.detect(None, 2)
    assert found == (2, 3, f"127.0.0.1:{launchers.DEFAULT_PORT}", "gketpu") and ids is None
    assert "MEGASCALE_NUM_SLICES" not in os.environ  # libtpu reads it too
    clean_env.setenv("MEGASCALE_NUM_SLICES", "2")
    clean_env.setenv("MEGASCALE_SLICE_ID", "1")
    clean_env.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost:9999")
    assert launchers.detect(8500, 2)[0] == (5, 6, "localhost:8500", "gketpu")

