import json

import pytest

from ddpm_jax.benchmark import page
from ddpm_jax.errors import UserError


def compiled(batch):
    return {
        "about": {"program": "train_step", "config": "cifar10", "runner": "jit",
                  "dtype": "bfloat16", "topology": "v3-8"},
        "sweep": ["batch", batch], "jaxpr_equations": 1, "stablehlo": {"instructions": 20},
        "seconds": {stage: {"wall_s": 7.0, "cpu_s": cpu} for stage, cpu in (
            ("trace", batch), ("lower", 1.0), ("compile", 9.0))},
        "cost": {"bytes": None}, "executable_bytes": 10**6,
        "hlo": {"instructions": 49_029, "kernels": 30, "bytes": batch * 1e9, "collectives": {
            "all-reduce": {"count": 2, "bytes": 143e6}}},
        "memory": {"peak": 2e9}, "fit": {"free": 0.875}, "roofline": {"seconds": batch * 1e-3},
        "versions": {"jax": "0.10.2"}}


def measured(**more):
    return {"bench": "step", "name": "ddpm_jax", "config": "cifar10", "dtype": "bfloat16",
            "seconds": {"median": 0.02, "low": 0.02, "high": 0.02, "repeats": 3},
            "images_per_s": 6400.0, "mfu": 0.25, "device_kind": "GPU", "devices": 1,
            "versions": {"jax": "0.11.2"}, "commit": "84ae50c", **more}


def test_a_folder_of_rows_is_a_section_with_its_profiles_side_by_side(tmp_path):
    (tmp_path / "r/h100").mkdir(parents=True)
    norm, apply = ({"seconds": s, "launches": n, "bytes": 1.0} for s, n in ((0.004, 30), (5e-4, 2)))
    for name, parts in (("a", {"norm": norm, "apply": apply}), ("b", {"norm": norm})):
        (tmp_path / f"r/h100/{name}.json").write_text(json.dumps([measured(
            profile={"seconds": 0.0199, "parts": parts})]))
    (tmp_path / "r/h100/c.json").write_text(json.dumps([measured(note="12 steps")]))
    (tmp_path / "r/h100.md").write_text("One card.")
    page.write(tmp_path / "r", tmp_path / "P.md")
    text = (tmp_path / "P.md").read_text()
    assert text.index("## h100") < text.index("One card.") < text.index("| a | ddpm_jax |")
    assert "| 25.0% | 12 steps |" in text and "jax 0.11.2, commit 84ae50c" in text
    assert "| ms of a step (kernels) | a | b |" in text
    assert "| norm | 4.00 (30) | 4.00 (30) |" in text and "| apply | 0.50 (2) |  |" in text
    assert "| all kernels | 19.90 | 19.90 |" in text and "| measured step | 20.00 |" in text


def test_the_page_is_made_of_the_results(tmp_path):
    results = tmp_path / "benchmarks"
    results.mkdir()
    with pytest.raises(UserError, match="no JSON"):
        page.write(results, tmp_path / "BENCHMARKS.md")
    (results / "sweep.json").write_text('[{"sweep": ')
    with pytest.raises(UserError, match="sweep.json is not JSON"):
        page.write(results, tmp_path / "BENCHMARKS.md")
    (results / "sweep.json").write_text(json.dumps([compiled(1), compiled(4)]))
    (results / "sweep.md").write_text("What it is.")
    (results / "failed.json").write_text(json.dumps([{"cell": "a|b", "error": "no"}]))
    (results / "step.json").write_text(json.dumps([{
        "bench": "step", "name": "ddpm_jax", "config": "digits", "dtype": "float32",
        "seconds": {"median": 0.25, "low": 0.2, "high": 0.3, "repeats": 3}, "images_per_s": 512.0,
        "mfu": None, "device_kind": "cpu", "devices": 1, "versions": {"jax": "0.10.2"}}]))
    files = page.write(results, tmp_path / "BENCHMARKS.md")
    text = (tmp_path / "BENCHMARKS.md").read_text()
    assert files == [str(tmp_path / "BENCHMARKS.md"), str(results / "sweep-batch.png")]
    assert (results / "sweep-batch.png").read_bytes().startswith(b"\x89PNG")
    assert "| 49,029 |" in text and "all-reduce 2 (143 MB)" in text and "88%" in text
    assert "What it is." in text and "a\\|b" in text and "sweep-batch.png" in text
    assert "| batch | 1, 4 | 1.00 | 0.00 | 0.00 |" in text  # exponents
    assert "250.00" in text and "n/a" in text and "jax 0.10.2" in text
    # Deterministic: a second run changes nothing.
    page.write(results, tmp_path / "BENCHMARKS.md")
    assert (tmp_path / "BENCHMARKS.md").read_text() == text
