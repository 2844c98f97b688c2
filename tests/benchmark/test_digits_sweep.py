"""The config digits is what its sweep recorded."""

import json
import pathlib

from ddpm_jax.api import load_config

LINES = pathlib.Path(__file__).parents[2] / "benchmarks" / "digits_sweep.jsonl"
ONLY_MORE_OFTEN = ("checkpoint.every", "eval.sample_every")   # pictures and saves: no weights


def test_the_packaged_config_is_the_best_row():
    """By bits/dim: FD-cnn of one training differs by more from set to set than between rows."""
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    best = min(rows, key=lambda row: row["bpd"])
    fields = {k: v for k, v in best["fields"].items() if k not in ONLY_MORE_OFTEN}
    assert load_config("digits", fields) == load_config("digits")
