import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.compilation import cache


@pytest.fixture
def cache_settings():
    """Puts JAX's own settings back: the other tests share one cache."""
    before = (jax.config.jax_compilation_cache_dir,
              jax.config.jax_persistent_cache_min_compile_time_secs)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    cache.compilation_cache.reset_cache()


def test_a_second_compilation_of_the_same_program_is_a_hit(cache_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    folder = cache.enable_compilation_cache(str(tmp_path / "xla"))
    assert folder == str(tmp_path / "xla")

    def cube_and_shift(x):
        return x**3 - 7.25

    with cache.count_compilations() as seen:
        jax.jit(cube_and_shift).lower(jnp.ones(3)).compile()
        jax.clear_caches()
        jax.jit(cube_and_shift).lower(jnp.ones(3)).compile()
    mine = [c for c in seen if "cube_and_shift" in c.name]
    assert [c.cache for c in mine] == ["miss", "hit"]
    assert "(cache: hit)" in str(mine[1]) and mine[1].seconds > 0
    assert os.listdir(folder)


def test_a_compilation_without_the_cache(cache_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    folder = cache.enable_compilation_cache(str(tmp_path / "xla"))

    def compile(power):
        with cache.count_compilations() as seen:
            jax.jit(lambda x: x**power - 8.25).lower(jnp.ones(3)).compile()
        return [c.cache for c in seen if "lambda" in c.name]

    assert compile(3) == ["miss"]
    kept = sorted(os.listdir(folder))
    with cache.without_compilation_cache():
        assert compile(3) == ["off"] and compile(4) == ["off"]
    assert sorted(os.listdir(folder)) == kept
    assert compile(4) == ["miss"] and compile(3) == ["hit"]


def test_the_parts_of_a_key(cache_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    cache.enable_compilation_cache(str(tmp_path / "xla"))

    def parts(power):
        with cache.key_parts() as found:
            jax.jit(lambda x: x**power - 9.25).lower(jnp.ones(3)).compile()
        return found

    first, same, other = parts(3), parts(3), parts(4)
    assert first == same and {"computation", "compile_options", "XLA flags"} <= set(first)
    assert [name for name in first if first[name] != other[name]] == ["computation"]
    with cache.without_compilation_cache():
        assert parts(3) == {}


def test_counting_sees_recompilation_and_only_that():
    step = jax.jit(lambda x: x * 2 + 1)
    step(jnp.ones(4))
    with cache.count_compilations() as outer:
        for _ in range(3):
            step(jnp.ones(4))
        assert not [c for c in outer if "lambda" in c.name]
        with cache.count_compilations() as inner:
            step(jnp.ones(5))
        step(jnp.ones(6))
    assert len([c for c in inner if "lambda" in c.name]) == 1
    assert len([c for c in outer if "lambda" in c.name]) == 2


def test_environment_and_unusable_folders(cache_settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert cache.enable_compilation_cache(str(tmp_path / "file" / "below")) is None
    assert cache.enable_compilation_cache("") is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    assert cache.enable_compilation_cache() == str(tmp_path / "told")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.enable_compilation_cache() == str(tmp_path / ".cache/ddpm_jax/xla")


def test_a_user_without_a_home_has_no_cache(cache_settings, tmp_path, monkeypatch):
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    for name in ("HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_compilation_cache_dir", None)
    assert cache.enable_compilation_cache() is None
    assert list(tmp_path.iterdir()) == []


def test_an_empty_variable_switches_the_cache_off():
    code = ("from ddpm_jax.compilation.cache import enable_compilation_cache as e;"
            "print(e())")
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": ""}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                         text=True, check=True)
    assert out.stdout.strip() == "None"
