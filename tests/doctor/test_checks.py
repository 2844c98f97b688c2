"""ddpm doctor: each check can fail."""

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
