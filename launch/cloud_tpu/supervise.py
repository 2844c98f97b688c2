"""The supervisor: looks at machines and workers, and acts by the first row of STATES that holds.

It keeps nothing but counters (`Memory`): it can be killed and run again.
"""

import dataclasses
from typing import NamedTuple

from cloud_tpu import LaunchError, steps
from cloud_tpu.accelerators import parse_accelerator
from cloud_tpu.commands import SSH_FAILED, Message, Sleep

RESTART = 42            # the program saved on a signal: restart, not counted
FAILURES_OF_SSH = 3     # in a row, then the machines count as lost
SETTLE = 6              # looks at workers of which some have ended well and some still run
WITHOUT_PROGRESS = 3    # restarts that reach no new checkpoint


@dataclasses.dataclass
class Memory:
    """Counters of one supervisor. vms: names of the machines."""

    vms: list | None = None
    ready: bool = False     # machines are there and set up
    started: bool = False   # the command was started on them
    looks: int = 0
    settling: int = 0       # looks in a row that found them ending
    unreachable: int = 0    # failures of ssh in a row
    restarts: int = 0
    barren: int = 0         # restarts in a row without a new checkpoint
    best: int = -1          # newest checkpoint


class Look(NamedTuple):
    """What is seen: the supervisor's memory, whether all workers answer, and what they answer."""

    memory: Memory
    complete: bool
    workers: list

    @property
    def states(self) -> set:
        return {w.state for w in self.workers}

    @property
    def codes(self) -> set:
        return {w.rc for w in self.workers if w.state == "exited"}


class State(NamedTuple):
    """A row of STATES. action(o, look): a generator; returns an exit code to end with, or None."""

    holds: object
    action: object


def supervise(o):
    memory, code = Memory(), None
    while code is None:
        look = yield from look_at(o, memory)
        code = yield from STATES[state(look)].action(o, look)
    return code


def state(look: Look) -> str:
    """The name of the first row that holds."""
    return next(name for name, row in STATES.items() if row.holds(look))


def look_at(o, memory):
    if not memory.ready:
        return Look(memory, False, [])
    rc, workers = yield from steps.workers(o, memory.vms, "exited" if memory.looks else "absent")
    memory.looks += 1
    expected = parse_accelerator(o.accelerator).hosts * o.slices
    complete = not rc and len(workers) >= expected
    if complete:
        memory.unreachable = 0
    return Look(memory, complete, [of_this_command(o, w) for w in workers])


def of_this_command(o, worker):
    """The worker; absent where what has ended there was another command."""
    if worker.key == steps.key(o) or worker.state == "absent":
        return worker
    if worker.state == "running":
        raise LaunchError(f"--name={o.name} is taken: another command runs under it on "
                          f"{worker.host}; choose another name, or stop it")
    return worker._replace(state="absent", rc=None)


# --- actions -------------------------------------------------------------------------------------

def prepare(o, look):
    """Machines, and the environment on them."""
    memory = look.memory
    memory.vms = yield from steps.create(o)
    rc = yield from steps.setup(o, memory.vms, check=False)
    if not rc:
        memory.ready, memory.started, memory.unreachable, memory.settling = True, False, 0, 0
        return
    memory.unreachable += 1
    if memory.unreachable < FAILURES_OF_SSH:
        yield Message(f"setup failed on a worker ({rc}), try {memory.unreachable} of "
                      f"{FAILURES_OF_SSH}")
        yield Sleep(o.poll)
        return
    if rc != SSH_FAILED:
        raise LaunchError(f"setup fails on a worker with {rc}; its output is above")
    yield from replace_machines(o, memory)


def try_again(o, look):
    """Some workers do not answer: look again, then replace the machines."""
    memory = look.memory
    memory.unreachable += 1
    yield Message(f"{len(look.workers)} of {parse_accelerator(o.accelerator).hosts * o.slices} "
                  f"workers answer, try {memory.unreachable} of {FAILURES_OF_SSH}")
    machines, _ = yield from steps.state_of(o)
    if machines == "ACTIVE" and memory.unreachable < FAILURES_OF_SSH:
        yield Sleep(o.poll)
        return
    memory.ready, memory.unreachable = False, 0
    yield from steps.stop(o, memory.vms, check=False)
    if machines == "ACTIVE":  # nevertheless a worker is dead: only new machines help
        yield from replace_machines(o, memory)


def replace_machines(o, memory):
    memory.unreachable = 0
    count_restart(o, memory)
    yield Message(f"{o.name}: machines count as lost, new ones are requested")
    yield from steps.delete(o)


def end_on_bug(o, look):
    """A restart would not help: ends everything with the worker's exit code."""
    yield from steps.stop(o, look.memory.vms, check=False, grace=15)
    yield from steps.logs(o, look.memory.vms, lines=20, worker="all", check=False)
    worker = bugs(look)[0]
    raise LaunchError(f"worker {worker.host} ended with {worker.rc}, a restart would not help; "
                      f"last line: {worker.last}", worker.rc)


def end(o, look):
    yield Message("done")
    if o.delete_when_done:
        yield from steps.delete(o)
    return 0


def wait(o, look):
    yield Sleep(o.poll)


def settle(o, look):
    look.memory.settling += 1
    yield Sleep(min(o.poll, 10))


def start(o, look):
    look.memory.started, look.memory.settling = True, 0
    yield from steps.train(o, look.memory.vms)
    yield Sleep(o.poll)


def restart(o, look):
    """One has ended, or all stopped in order to be restarted: none may be left over."""
    memory = look.memory
    yield Message("restarting: " + ", ".join(
        f"{w.host} {w.state}{'' if w.rc is None else f' {w.rc}'}" for w in look.workers[:8]))
    yield from steps.stop(o, memory.vms, check=False, grace=15)
    _, workers = yield from steps.workers(o, memory.vms, "exited")
    after = Look(memory, True, workers)
    if bugs(after):
        yield from end_on_bug(o, after)
    free = look.codes and look.codes <= {0, RESTART} and look.states == {"exited"}
    step = yield from steps.latest_step(o, memory.vms)
    if step is not None and step > memory.best:
        memory.best, memory.barren = step, 0
    elif not free:
        memory.barren += 1
        if memory.barren >= WITHOUT_PROGRESS:
            yield from steps.logs(o, memory.vms, lines=20, worker="all", check=False)
            raise LaunchError(f"{memory.barren} restarts without a new checkpoint (newest: "
                              f"{'none' if memory.best < 0 else memory.best}); stopped, see the "
                              "logs")
    if not free:
        count_restart(o, memory)
        yield Sleep(min(o.backoff * 2 ** min(memory.barren, 5), 600))
    yield from start(o, look)


def count_restart(o, memory):
    memory.restarts += 1
    if memory.restarts > o.max_restarts:
        raise LaunchError(f"{o.max_restarts} restarts (--max-restarts) are used up")


def bugs(look) -> list:
    """Workers with an exit code that a restart would not change."""
    return [w for w in look.workers
            if w.rc is not None and 0 < w.rc < 128 and w.rc != RESTART]


def _ending(look) -> bool:
    # They end together, but not in the same instant.
    return (look.codes <= {0, RESTART} and look.states == {"exited", "running"}
            and look.memory.settling < SETTLE)


STATES = {
    "no machines": State(lambda look: not look.memory.ready, prepare),
    "unreachable": State(lambda look: not look.complete, try_again),
    "bug": State(bugs, end_on_bug),
    "done": State(lambda look: look.states == {"exited"} and look.codes == {0}, end),
    "running": State(lambda look: look.states == {"running"}, wait),
    "ending": State(_ending, settle),
    "idle": State(lambda look: look.states == {"absent"} and not look.memory.started, start),
    "stopped": State(lambda look: True, restart),
}
