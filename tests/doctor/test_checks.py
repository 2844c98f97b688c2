"""ddpm doctor: each check can fail."""

import pathlib
import re

from ddpm_jax.doctor import checks


def test_workdir_is_written_and_left_clean(tmp_path):
    [finding] = checks.check_workdir(str(tmp_path / "new"))
    assert finding.ok and list((tmp_path / "new").iterdir()) == []


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    [finding] = checks.check_workdir(str(tmp_path / "file" / "run"))
    assert finding.ok is False and "cannot write" in finding.text and "choose a folder" in (
        finding.text)


def test_stale_lock_and_live_lock(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    assert checks.check_lock(str(lock)) == []
    lock.write_text("")
    monkeypatch.setattr(checks, "holders_of_tpu", lambda: [])
    [finding] = checks.check_lock(str(lock))
    assert finding.ok is False and f"sudo rm {lock}" in finding.text
    monkeypatch.setattr(checks, "holders_of_tpu", lambda: [77])
    assert "in use by process 77" in checks.check_lock(str(lock))[0].text


def test_full_disk(tmp_path):
    assert checks.check_disk(tmp_path, need_gb=0).ok
    finding = checks.check_disk(tmp_path, need_gb=10**9)
    assert finding.ok is False and "needed" in finding.text


def test_versions_that_do_not_match(monkeypatch):
    assert checks.check_python().ok
    found = {**checks.hosts.versions(), "jaxlib": "0.0.1"}
    monkeypatch.setattr(checks.hosts, "versions", lambda: found)
    assert "same version of both" in checks.check_python().text
    found["optax"] = "absent"
    assert "optax not installed" in checks.check_python().text


def test_bucket_problem_names_the_role():
    assert "does not exist" in checks.bucket_problem("b", FileNotFoundError("b"))
    text = checks.bucket_problem("b", OSError("403, x does not have storage.buckets.get access"))
    assert "roles/storage.legacyBucketReader" in text and "gs://b" in text


def test_settings_that_change_numbers_are_shown(monkeypatch):
    for name in [*map(str.upper, checks.hosts.SETTINGS), "XLA_FLAGS", "LIBTPU_INIT_ARGS"]:
        monkeypatch.delenv(name, raising=False)
    assert checks.check_settings().ok
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert checks.check_settings().ok                # of this host alone
    monkeypatch.setenv("JAX_THREEFRY_PARTITIONABLE", "0")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    finding = checks.check_settings()
    assert finding.ok is None and "XLA_FLAGS=--xla_cpu_enable_fast_math=true can" in finding.text
    assert "JAX_THREEFRY_PARTITIONABLE=0 ignored" in finding.text


def test_no_remedy_names_a_package_that_is_not_this_project():
    """The name ddpm_jax is not registered on the package index: what is installed by it is another
    project's."""
    root = pathlib.Path(__file__).parents[2]
    files = [root / "README.md", *(root / "docs").rglob("*.md")] + [
        p for part in ("ddpm_jax", "launch") for p in (root / part).rglob("*")
        if p.suffix in (".py", ".md", ".yaml", ".sh", ".txt", ".sbatch")]
    wrong = [str(p) for p in files if re.search(r"pip install[^|`\n]*\bddpm[_-]jax\b(?!/)",
                                                p.read_text())]
    assert not wrong, wrong
