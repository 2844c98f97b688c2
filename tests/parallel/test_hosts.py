import socket

import pytest
from pod_processes import Processes, free_port

from ddpm_jax.parallel import hosts


@pytest.mark.multiprocess
def test_hosts_that_differ_are_named_and_equal_ones_pass(tmp_path):
    with Processes(tmp_path, ["facts"], 2, env={"CONFIG": "abc"}) as run:
        assert run.wait() == [0, 0]
    assert all("SAME" in run.text(i) for i in (0, 1))
    port = free_port()
    with Processes(tmp_path, ["facts"], 3, env={"CONFIG": "abc"}, port=port, only=[0, 2]) as run, \
            Processes(tmp_path, ["facts"], 3, env={"CONFIG": "xyz"}, port=port, only=[1]) as odd:
        assert run.wait() + odd.wait() == [2, 2, 2]
        for text in (run.text(0), run.text(1), odd.text(0)):
            assert "process 1 on" in text and "config=xyz (process 0 has abc)" in text
            assert "process 2 on" not in text.split("DIFFER")[1]


def test_versions_name_what_must_agree():
    import jax
    assert hosts.versions()["jax"] == jax.__version__
    assert set(hosts.versions()) >= {"python", "jaxlib", "flax", "orbax-checkpoint"}



@pytest.mark.multiprocess
@pytest.mark.parametrize("variable, value, line", [
    ("JAX_THREEFRY_PARTITIONABLE", "0", "jax_threefry_partitionable=False (process 0 has True)"),
    ("JAX_DEFAULT_PRNG_IMPL", "rbg", "jax_default_prng_impl=rbg (process 0 has threefry2x32)"),
    ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true --xla_force_host_platform_device_count=1",
     "XLA_FLAGS=--xla_cpu_enable_fast_math=true (process 0 has none)")])
def test_settings_in_the_shell_of_one_host_are_named(tmp_path, variable, value, line):
    with Processes(tmp_path, ["facts"], 2, env=lambda i: {
            "CONFIG": "abc", "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            **({variable: value} if i else {})}) as run:
        assert run.wait() == [2, 2], run.text(0)
        assert all(f"process 1 on {socket.gethostname()}: {line}" in run.text(i) for i in (0, 1))


def test_every_setting_is_one_of_jax():
    assert "absent" not in hosts.settings().values()
