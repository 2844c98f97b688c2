"""evaluation.json."""

from ddpm_jax.evaluation.records import write_records


def test_records_are_kept_beside_each_other(tmp_path):
    path = tmp_path / "evaluation.json"
    write_records(path, 7, "paper", [("ema", {"bpd": 1.0}, {"seed": 0})])
    write_records(path, 7, "monitor", [("ema", {"fid": 2.0}, {})])
    found = write_records(path, 7, "paper", [("ema", {"kid": 3.0}, {"seed": 0})])
    assert found["7"]["paper"]["ema"]["values"] == {"bpd": 1.0, "kid": 3.0}
    assert found["7"]["monitor"]["ema"]["values"] == {"fid": 2.0}
    assert "jax" in found["7"]["paper"]["ema"]["provenance"]["versions"]
