"""Compile on a thread what a command will run, while it reads what it will run on."""

import contextlib
import threading

from ddpm_jax.compilation.cache import count_compilations


@contextlib.contextmanager
def compiled_ahead(program, *arguments):
    """Compile ``program``, which has .lower, for ``arguments`` while the block runs: abstract ones,
    or numbers of numpy where the call will have such (they have no sharding).

    Gives the list of ``count_compilations``. The block ends when the compilation has. JAX keeps
    the result with the function, so that a later call with such arguments traces and compiles
    nothing. An error is left for that call to raise.

    Tracing and lowering come before the block: they are Python, and beside a block that is too,
    both take longer than one after the other (benchmarks/NOTES.md, "Warm start").
    """
    lowered = None
    with contextlib.suppress(Exception):
        lowered = program.lower(*arguments)

    def work():
        with contextlib.suppress(Exception):
            if lowered is not None:
                lowered.compile()

    with count_compilations() as compiled:
        thread = threading.Thread(target=work, name="compiled_ahead")
        thread.start()
        try:
            yield compiled
        finally:
            thread.join()
