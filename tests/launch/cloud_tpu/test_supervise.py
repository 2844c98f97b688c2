"""The supervisor's table, walked row by row; tests/launch/test_tpu.py runs it against workers."""

import itertools

import pytest
from cloud_tpu import LaunchError, __main__, commands, steps, supervise
from cloud_tpu.supervise import Look, Memory


def options(*more):
    return __main__.parse(["supervise", "--name=run", "--accelerator=v4-16",
                           "--zone=us-central2-b", *more, "--", "ddpm", "train"])


def worker(state, rc=None):
    return steps.Worker("w", state, rc, steps.key(options()), "last words")


WORKERS = [worker("absent"), worker("running"), worker("lost"),
           *[worker("exited", rc) for rc in (0, 42, 1, 2, 134, 137, 170, 171)]]
READY = dict(vms=[], ready=True)


def looks():
    """What two workers can answer, before and after a start, early and late in settling."""
    for pair in itertools.product(WORKERS, repeat=2):
        for started, settling in itertools.product([False, True], [0, supervise.SETTLE]):
            yield Look(Memory(**READY, started=started, settling=settling), True, list(pair))
    yield Look(Memory(**READY), False, [worker("running")])
    yield Look(Memory(), False, [])


def test_every_row_is_reached_and_no_look_is_without_one():
    assert {supervise.state(look) for look in looks()} == set(supervise.STATES)


def expected(look):
    """The same table, written from launch/README.md's exit codes rather than from STATES."""
    codes = [w.rc for w in look.workers]
    states = sorted({w.state for w in look.workers})
    if any(rc in (1, 2) for rc in codes):
        return "bug"
    if codes == [0, 0]:
        return "done"
    if states == ["running"]:
        return "running"
    if states == ["exited", "running"] and look.memory.settling < supervise.SETTLE:
        return "ending" if {*codes} <= {None, 0, 42} else "stopped"
    if states == ["absent"] and not look.memory.started:
        return "idle"
    return "stopped"


def test_each_pair_of_workers_is_in_the_row_that_the_exit_codes_call_for():
    for look in looks():
        if look.complete:
            assert supervise.state(look) == expected(look), look


def walk(generator, answer=(0, "ACTIVE\tv4-16", "")):
    """Every command succeeds; -> (what was yielded, the return value or the LaunchError)."""
    done = []
    try:
        item = next(generator)
        while len(done) < 100:
            done.append(item)
            item = generator.send(answer if isinstance(item, commands.Command) else None)
    except StopIteration as end:
        return done, end.value
    except LaunchError as error:
        return done, error
    raise AssertionError("endless")


def verbs(done):
    """The commands as words: create, setup, start, stop, status, logs, delete, ..."""
    words = [" ".join(item.argv) for item in done if isinstance(item, commands.Command)]
    return [next(v for v in ("host.sh setup", "host.sh start", "host.sh stop", "host.sh status",
                             "host.sh logs", "host.sh latest", "describe", "create", "delete",
                             "scp", "pip wheel") if v in line).removeprefix("host.sh ")
            for line in words]


@pytest.mark.parametrize("row, look, does, ends", [
    ("no machines", Look(Memory(), False, []), ["describe", "pip wheel", "scp", "setup"], None),
    ("unreachable", Look(Memory(**READY), False, []), ["describe"], None),
    ("bug", Look(Memory(**READY), True, [worker("exited", 2)]), ["stop", "logs"], 2),
    ("done", Look(Memory(**READY), True, [worker("exited", 0)] * 2), [], 0),
    ("running", Look(Memory(**READY), True, [worker("running")] * 2), [], None),
    ("ending", Look(Memory(**READY), True, [worker("exited", 42), worker("running")]), [], None),
    ("idle", Look(Memory(**READY), True, [worker("absent")] * 2), ["start"], None),
    ("stopped", Look(Memory(**READY), True, [worker("exited", 42)] * 2),
     ["stop", "status", "start"], None)])
def test_the_action_of_each_row(row, look, does, ends):
    assert supervise.state(look) == row
    done, result = walk(supervise.STATES[row].action(options(), look))
    assert verbs(done) == does
    assert (result.code if isinstance(result, LaunchError) else result) == ends
    if ends is None:  # looked at again after a wait, or at once where machines are new
        assert isinstance(done[-1], commands.Sleep) or look.memory.ready and look.memory.vms == []


def test_42_is_free_and_a_loss_is_counted_until_no_checkpoint_is_new():
    memory = Memory(**READY, started=True)
    o = options("--max-restarts=2")
    for _ in range(5):
        walk(supervise.restart(o, Look(memory, True, [worker("exited", 42)] * 2)))
    assert memory.restarts == memory.barren == 0
    lost = Look(memory, True, [worker("lost"), worker("running")])
    results = [walk(supervise.restart(o, lost))[1] for _ in range(3)]
    assert results[:2] == [None, None] and "without a new checkpoint" in str(results[2])


def test_machines_are_replaced_after_three_failures_in_a_row():
    memory = Memory(**READY)
    for replaced in (False, False, True):
        done, _ = walk(supervise.try_again(options(), Look(memory, False, [worker("running")])))
        assert ("delete" in verbs(done)) == replaced
    assert not memory.ready and memory.restarts == 1 and memory.unreachable == 0
