"""A small stand-in for `ddpm train` with the real parts: jax.distributed, Orbax, exit codes.

The state is a vector spread over all processes; step n adds n to it, so the end tells whether any
step was lost or done twice. argv: WORKDIR STEPS [--delay=SECONDS] and the flags of the pod.
"""

import os
import pathlib
import sys
import time

from absl import flags

from ddpm_jax.parallel.exit_codes import EXIT_RESTART
from ddpm_jax.parallel.pod import initialize
from ddpm_jax.parallel.pod_flags import define_flags
from ddpm_jax.parallel.stop import watch_for_stop

flags.DEFINE_float("delay", 0.02, "seconds a step")
flags.DEFINE_integer("every", 10, "steps between checkpoints")
define_flags()


def main(argv):
    _, workdir, steps = flags.FLAGS(argv)
    pod = initialize()
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from jax.sharding import NamedSharding, PartitionSpec

    stop = watch_for_stop()
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    start = jnp.arange(float(jax.device_count()))
    state = jax.make_array_from_callback(start.shape, rows, lambda i: start[i])
    step_fn = jax.jit(lambda x, n: (x + n, (x + n).sum()), out_shardings=(rows, None))
    manager = ocp.CheckpointManager(
        os.path.join(workdir, "checkpoints"), options=ocp.CheckpointManagerOptions(max_to_keep=2))
    first = manager.latest_step() or 0
    if first:
        target = {"x": jax.ShapeDtypeStruct(state.shape, state.dtype, sharding=rows)}
        state = manager.restore(first, args=ocp.args.StandardRestore(target))["x"]
    print(f"trainer: from step {first}", flush=True)
    for step in range(first, int(steps)):
        state, total = step_fn(state, float(step))
        total = float(total)  # waits for the collective
        stop.unsaved(True)
        done = step + 1
        leave = stop.requested(done)
        if leave or done % flags.FLAGS.every == 0 or done == int(steps):
            manager.save(done, args=ocp.args.StandardSave({"x": state}), force=True)
        if leave:
            manager.wait_until_finished()
            stop.unsaved(False)
            print(f"trainer: saved {done}", flush=True)
            manager.close()
            return EXIT_RESTART
        time.sleep(flags.FLAGS.delay)
    manager.close()
    stop.unsaved(False)
    if pod.process_id == 0:
        pathlib.Path(workdir, "total").write_text(str(total))
    print(f"trainer: done, total {total}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
