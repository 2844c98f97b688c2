"""The persistent compilation cache, and a count of what was compiled and what it cost."""

import contextlib
import logging
import os
import pathlib
import threading
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

DEFAULT_DIRECTORY = "~/.cache/ddpm_jax/xla"
REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
HIT = "/jax/compilation_cache/cache_hits"
COMPILE = "/jax/core/compile/backend_compile_duration"


class Compilation(NamedTuple):
    """One program handed to XLA: its name, wall seconds, and 'hit', 'miss' or 'off'."""

    name: str
    seconds: float
    cache: str

    def __str__(self):
        return f"compiled {self.name} in {self.seconds:.1f} s (cache: {self.cache})"


def enable_compilation_cache(directory: str | None = None, *, min_seconds: float = 0.1):
    """Keep compiled programs in `directory` between runs; returns its path, or None where off.

    The order is: `directory`, JAX's own setting (JAX_COMPILATION_CACHE_DIR), the default
    ~/.cache/ddpm_jax/xla. An empty JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=false or
    a folder that cannot be made leaves the cache off: a run never fails for lack of it.
    Programs that compile faster than `min_seconds` are not kept, unless
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS is set. On a GPU the results of XLA's
    autotuning are kept in the same folder. Call it before the first compilation.
    """
    if directory is None:
        directory = jax.config.jax_compilation_cache_dir
    if directory is None:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT_DIRECTORY)
    if not directory or not jax.config.jax_enable_compilation_cache:
        return None
    if "://" not in directory:
        directory = os.path.expanduser(directory)
        if directory.startswith("~"):  # a user without a home
            return None
        directory = os.path.abspath(directory)
        try:
            pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(directory, os.W_OK):
            return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()  # forget a decision taken before the folder was known
    return directory


_open_counts: list[list[Compilation]] = []
_this_thread = threading.local()
_listening = threading.Event()


def _on_event(event: str, **_):
    if event == REQUEST:
        _this_thread.cache = "miss"
    elif event == HIT:
        _this_thread.cache = "hit"


def _on_duration(event: str, seconds: float, **about):
    if event == COMPILE:
        done = Compilation(str(about.get("fun_name", "?")), seconds,
                           getattr(_this_thread, "cache", "off"))
        _this_thread.cache = "off"
        for compilations in _open_counts:
            compilations.append(done)


@contextlib.contextmanager
def count_compilations():
    """A list that grows by one `Compilation` for each program XLA compiles, or reads back, inside.

    Nothing is added for a call of what is compiled already: an unchanged length is the proof that
    a loop does not recompile.
    """
    if not _listening.is_set():
        _listening.set()
        jax.monitoring.register_event_listener(_on_event)
        jax.monitoring.register_event_duration_secs_listener(_on_duration)
    compilations: list[Compilation] = []
    _open_counts.append(compilations)
    try:
        yield compilations
    finally:
        # By identity: two lists with equal contents are still two counts.
        _open_counts[:] = [c for c in _open_counts if c is not compilations]


@contextlib.contextmanager
def without_compilation_cache():
    """Nothing compiled inside is read from the persistent cache or kept there."""
    was = jax.config.jax_enable_compilation_cache
    # JAX decides once a process whether there is a cache: make it forget.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()


class _KeyParts(logging.Handler):
    """Collects what jax._src.cache_key logs of each part of a key: {part: hash}."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.parts = {}

    def emit(self, record):
        if "hash of serialized" in record.msg and len(record.args) == 2:
            name, digest = record.args
            self.parts[name] = digest[:16]


@contextlib.contextmanager
def key_parts():
    """A dict that holds, after a compilation inside that asked the persistent cache, the hash of
    each part of its key by JAX's name of the part: computation, compile_options, ..."""
    logger, handler = logging.getLogger("jax._src.cache_key"), _KeyParts()
    was = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield handler.parts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(was[0])
        logger.propagate = was[1]
