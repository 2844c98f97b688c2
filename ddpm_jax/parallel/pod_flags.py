"""The flags of a program that may run in a pod, which help lists without importing JAX."""

import functools

from absl import flags

from ddpm_jax.parallel.exit_codes import EXIT_HUNG

# JAX's own default, 8482, is closed by the firewall rules that Google Cloud makes for TPU
# networks; 8476 is open there (jax issue 35905).
DEFAULT_PORT = 8476
MULTIHOST = ["auto", "off"]


def define_flags(values: flags.FlagValues = flags.FLAGS):
    """Defines in `values` the flags that `initialize` and `start_watchdog` read. Each has an
    environment variable too."""
    string, integer, number, enum = (
        functools.partial(define, flag_values=values) for define in
        (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_enum))
    enum("multihost", "auto", MULTIHOST,
         "auto: join the other processes that the environment names (DDPM_*, Cloud TPU, GKE, "
         "SLURM, Open MPI, Kubernetes); off: run alone (env DDPM_MULTIHOST)")
    string("coordinator", None, "HOST or HOST:PORT of process 0 (env DDPM_COORD)")
    integer("coordinator_port", None,
            f"port of the coordinator (env JAX_COORDINATOR_PORT); default {DEFAULT_PORT}, on SLURM "
            "derived from the job's number", lower_bound=1, upper_bound=65535)
    integer("num_processes", None, "processes in all (env DDPM_NPROC)", lower_bound=1)
    integer("process_id", None, "number of this process, from 0 (env DDPM_PROC)", lower_bound=0)
    integer("init_timeout", None, "seconds to wait for the other processes; default 300, several "
            "TPU slices 3600 (env DDPM_INIT_TIMEOUT)", lower_bound=1)
    integer("heartbeat", None, "seconds after which a silent process counts as dead and the others "
            "end; default 30 (env DDPM_HEARTBEAT)", lower_bound=2)
    number("watchdog", 0.0, f"print all stacks and exit with {EXIT_HUNG} after this many seconds "
           "without a step; 0: never (env DDPM_WATCHDOG)", lower_bound=0.0)
