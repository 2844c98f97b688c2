from pod_processes import PROGRAM, Processes

from ddpm_jax.parallel import exit_codes


def test_watchdog_prints_the_hung_line(tmp_path):
    with Processes(tmp_path, ["loop", "hang"], 1, flags=["--watchdog=1.5"]) as run:
        assert run.wait() == [exit_codes.EXIT_HUNG]
    text = run.text(0)
    assert "no step for 1.5 s after step 60" in text
    hung = 1 + [i for i, x in enumerate(PROGRAM.splitlines()) if "time.sleep(60)" in x][0]
    assert f'"<string>", line {hung} in <module>' in text, text


def test_watchdog_sees_a_hang_that_holds_the_interpreter(tmp_path):
    with Processes(tmp_path, ["loop", "locked"], 1, flags=["--watchdog=1"]) as run:
        assert run.wait() == [1]
    assert "Timeout (0:00:03)!" in run.text(0) and "in block" in run.text(0)

