"""Exit codes of every program that runs on several hosts, and how a process of a pod ends.

Launchers, JobSet and sbatch rely on the codes:

====  ==========================================================================================
   0  done
   1  an uncaught exception, a bug; do not restart
   2  bad input, one line names it; do not restart
  42  ``EXIT_RESTART``: got SIGTERM, INT, HUP, USR1, USR2 or XCPU, everything worth keeping is
      saved; restart, free of charge
 130  ``EXIT_INTERRUPTED``: a second SIGINT, or one while there is nothing to save
 134  ``EXIT_LOST``: a peer died or did not come within --init_timeout (as a rule JAX itself
      aborts, which is the same number); restart, counted
 170  ``EXIT_HUNG``: the watchdog saw no step for too long and printed all stacks; restart, counted
 171  ``EXIT_UNREACHABLE``: no coordinator at the address; restart, counted
====  ==========================================================================================

The state of ``jax.distributed`` has no public accessor, hence `pod_state`.

Inside a function: JAX, so that the codes can be read without it.
"""

import contextlib
import os
import re
import sys
import time

EXIT_RESTART = 42
EXIT_INTERRUPTED = 130
EXIT_LOST = 134
EXIT_HUNG = 170
EXIT_UNREACHABLE = 171
LEAVE_PATIENCE_S = 10.0  # how long a peer with unsaved work may take to finish its save


def leave(code: int):
    """Ends a process of a pod with `code`, without JAX's shutdown barrier of 300 s.

    For errors: the other processes wait in a collective that this one will never enter. Gives
    them 10 s to come here with the same error, then goes; they end within the heartbeat. Returns
    where there is no pod, and for the codes 0 and EXIT_RESTART, which take the ordinary way.
    """
    if code in (0, EXIT_RESTART) or not in_pod():
        return
    with contextlib.suppress(Exception):
        pod_state().client.wait_at_barrier("ddpm/error", int(1000 * LEAVE_PATIENCE_S))
    if pod_state().process_id == 0:
        time.sleep(1.0)  # the service lives here: let the others go first
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def in_pod() -> bool:
    """Whether `initialize` has joined other processes. Imports no JAX: without it there are none.
    """
    return "jax" in sys.modules and pod_state().client is not None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because the other end is gone: the peer's log has the reason.

    JAX usually aborts by itself in this case; Gloo and NCCL sometimes raise first.
    """
    return re.search(r"gloo|nccl|\bUNAVAILABLE\b|connection (reset|closed|refused)|heartbeat|"
                     r"broken pipe|barrier", str(error), re.IGNORECASE) is not None


def pod_state():
    """``jax.distributed``'s state: client (None outside a pod), process_id, num_processes, ..."""
    from jax._src import distributed
    return distributed.global_state


def log(text: str):
    """Prints one line of progress or failure to stderr."""
    print(f"ddpm: {text}", file=sys.stderr, flush=True)
