import os
import signal
import time

import pytest
from pod_processes import Processes

from ddpm_jax.parallel import stop


@pytest.mark.smoke
@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_to_one_process_stops_all_at_the_same_step(tmp_path, who):
    with Processes(tmp_path, ["loop", "slowsave"], 2) as run:
        run.until("READY")
        run.popen[who].send_signal(signal.SIGTERM)
        run.until("SAVE ")
        run.popen[who].send_signal(signal.SIGTERM)  # a second one leaves the save alone
        run.popen[1 - who].send_signal(signal.SIGTERM)
        assert run.wait() == [42, 42]
        lines = [[x for x in run.text(i).splitlines() if x.startswith("SAVE")] for i in (0, 1)]
    assert lines[0] == lines[1] and len(lines[0]) == 2, lines
    assert "received SIGTERM" in run.text(who) and "waiting for" in run.text(1 - who)


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_during_a_compilation_ends_all_with_42(tmp_path, who):
    with Processes(tmp_path, ["compile"], 2) as run:
        run.until("READY")
        run.popen[who].send_signal(signal.SIGTERM)
        assert run.wait() == [42, 42]
    assert "nothing unsaved" in run.text(who) and "is leaving" in run.text(1 - who)


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_where_the_other_is_done_leaves_it_its_code(tmp_path, who):
    """The other waits in JAX's shutdown, and would be aborted where its peer just disappears."""
    with Processes(tmp_path, [], 2, env={"LATE": str(who)}) as run:
        run.until("END")
        run.popen[who].send_signal(signal.SIGTERM)
        codes = run.wait()
    assert (codes[who], codes[1 - who]) == (42, 0), (run.text(0), run.text(1))


@pytest.mark.multiprocess
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_after_the_last_step_changes_nothing(tmp_path, who, first):
    """The first to leave must not leave the other alone in JAX's protocol of preemption."""
    with Processes(tmp_path, ["last"], 2, env={"LAST": f"{who} {first}"}) as run:
        assert run.wait() == [0, 0], (run.text(0), run.text(1))


def test_single_process_stops_at_the_next_step(tmp_path):
    with Processes(tmp_path, ["loop", "slowsave"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(signal.SIGTERM)
        run.until("SAVE ")
        run.popen[0].send_signal(signal.SIGTERM)
        assert run.wait() == [42]
    assert run.text(0).count("SAVED") == 1


def test_single_process_leaves_during_a_compilation(tmp_path):
    with Processes(tmp_path, ["compile"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(signal.SIGTERM)
        assert run.wait() == [42]


OTHERS = [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize("number", OTHERS, ids=lambda number: number.name)
def test_terminals_and_batch_systems_are_heard_like_sigterm(tmp_path, number):
    with Processes(tmp_path, ["loop"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(number)
        assert run.wait() == [42]
    assert run.text(0).count("SAVED") == 1 and f"on {number.name}" in run.text(0)
    assert "Traceback" not in run.text(0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_they_stop_a_pod_at_the_same_step(tmp_path, number):
    with Processes(tmp_path, ["loop", "slowsave"], 2) as run:
        run.until("READY")
        run.popen[1].send_signal(number)
        assert run.wait() == [42, 42]
        lines = [[x for x in run.text(i).splitlines() if x.startswith("SAVE")] for i in (0, 1)]
    assert lines[0] == lines[1] and len(lines[0]) == 2, lines


def test_second_sigint_leaves_at_once(tmp_path):
    with Processes(tmp_path, ["loop", "slowsave"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(signal.SIGINT)
        run.until("SAVE ")
        time.sleep(2 * stop.ONE_PRESS_S)
        run.popen[0].send_signal(signal.SIGINT)
        assert run.wait() == [130]  # the save takes 2 s
    assert "SAVED" not in run.text(0) and "unsaved work is lost" in run.text(0)


def test_sigint_during_a_compilation(tmp_path):
    """One ends it with 42 where nothing is unsaved, two end it at once."""
    with Processes(tmp_path, ["compile"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(signal.SIGINT)
        assert run.wait() == [42]
    with Processes(tmp_path, ["compile"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(signal.SIGINT)
        time.sleep(2 * stop.ONE_PRESS_S)
        run.popen[0].send_signal(signal.SIGINT)
        assert run.wait() == [130]


def test_sigint_during_the_wait_for_peers(tmp_path):
    with Processes(tmp_path, [], 2, only=[0]) as run:
        run.until("waiting for 1 peer")
        time.sleep(1)  # in the wait itself
        run.popen[0].send_signal(signal.SIGINT)
        assert run.wait() == [-signal.SIGINT]


def test_what_is_ignored_at_the_start_stays_ignored(tmp_path):
    """nohup; a trap '' in a batch script."""
    with Processes(tmp_path, ["loop"], 1, ignored=OTHERS[1:]) as run:
        run.until("READY")
        for number in OTHERS[1:]:
            run.popen[0].send_signal(number)
        time.sleep(0.5)
        assert run.popen[0].poll() is None and "SAVE" not in run.text(0)
        run.popen[0].send_signal(signal.SIGTERM)
        assert run.wait() == [42]


def test_stop_puts_the_old_handler_back():
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    watch = stop.watch_for_stop()
    assert not watch.requested(0)
    watch.unsaved(True)
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.requested(1) and watch.requested(2)
    watch.close()
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before

