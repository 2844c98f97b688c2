import socket

import pytest
from pod_processes import Processes, free_port

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import exit_codes, hosts, pod


def test_no_coordinator_is_one_line_with_host_port_and_remedy(tmp_path):
    with Processes(tmp_path, [], 2, flags=["--init_timeout=1"], only=[1]) as run:
        assert run.wait() == [exit_codes.EXIT_UNREACHABLE]
    said = [x for x in run.text(0).splitlines() if x.startswith("ddpm: ")]
    assert "process 1 of 2" in said[0] and "waiting for process 0 at 127.0.0.1:" in said[0]
    assert "nothing listens on port" in said[1] and "Traceback" not in run.text(0)


def test_probe_tells_the_cases_apart():
    assert "unknown here" in pod.probe("no-such-host.invalid", 8476, 0.1)
    assert "nothing listens" in pod.probe("127.0.0.1", free_port(), 0.1)
    # 192.0.2.0/24 is reserved for documentation: no route, or silence, or a refusing gateway.
    assert "192.0.2.1:8476" in pod.probe("192.0.2.1", 8476, 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert pod.probe("127.0.0.1", listener.getsockname()[1], 1.0) is None


def test_firewall_command_when_packets_vanish(monkeypatch):
    def silent(address, timeout):
        raise TimeoutError("timed out")
    monkeypatch.setattr(socket, "create_connection", silent)
    assert "firewall-rules create" in pod.probe("10.0.0.2", 8476, 0.1)
    assert "tcp:8476" in pod.probe("10.0.0.2", 8476, 0.1)


def test_taken_port_is_an_error():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"coordinator_port {port} is taken"):
            pod.require_free_port(port)
    pod.require_free_port(free_port())


def test_one_process_is_a_no_op(clean_env):
    assert pod.initialize() == (0, 1, None, "alone", None)
    hosts.check_same_everywhere({"anything": "x"})
    clean_env.setenv("DDPM_NPROC", "1")
    assert pod.initialize().num_processes == 1
    # A pod of a plain Deployment, and one task under SLURM, are alone too.
    clean_env.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    clean_env.delenv("DDPM_NPROC")
    assert pod.initialize().num_processes == 1


@pytest.mark.parametrize("env, message", [
    ({"DDPM_COORD": "a:1"}, "--num_processes is missing"),
    ({"DDPM_COORD": "a:1", "DDPM_NPROC": "2", "DDPM_PROC": "2"}, "process_id 2: must be in 0..1"),
    ({"DDPM_COORD": "a:b", "DDPM_NPROC": "2", "DDPM_PROC": "1"}, "expected HOST:PORT"),
    ({"DDPM_NPROC": "two"}, "DDPM_NPROC='two': expected int"),
])
def test_bad_settings_are_one_line(clean_env, env, message):
    for name, value in env.items():
        clean_env.setenv(name, value)
    with pytest.raises(UserError, match=message):
        pod.initialize()

