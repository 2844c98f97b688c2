import signal

import pytest
from pod_processes import Processes

from ddpm_jax.parallel import exit_codes


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_exception_in_one_process_ends_the_run_with_its_code(tmp_path, who):
    with Processes(tmp_path, ["loop"], 2, flags=["--heartbeat=5"],
                   env=lambda i: {"RAISE": str(int(i == who))}) as run:
        codes = run.wait()
    # The bug's own code survives in the process that has it; the other says "peer lost".
    assert codes[who] == 1 and codes[1 - who] in (-signal.SIGABRT, exit_codes.EXIT_LOST)
    assert "AssertionError: RAISE" in run.text(who)


@pytest.mark.multiprocess
def test_worker_killed_ends_the_run_within_the_heartbeat(tmp_path):
    with Processes(tmp_path, ["loop"], 2, flags=["--heartbeat=5"]) as run:
        run.until("READY")
        run.popen[1].kill()
        codes = run.wait()
    assert codes[0] in (-signal.SIGABRT, exit_codes.EXIT_LOST)
    assert codes[1] == -signal.SIGKILL


def test_lost_peers_are_told_from_bugs():
    assert exit_codes.is_lost_peer(ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547]"))
    assert exit_codes.is_lost_peer(RuntimeError("UNAVAILABLE: Connection reset by peer"))
    assert not exit_codes.is_lost_peer(ValueError("Incompatible shapes for dot"))
    assert not exit_codes.is_lost_peer(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))

