"""The page of a run: what is on it, from files as the commands leave them."""

import base64
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
from tiny_run import config

from ddpm_jax.cli.main import _subcommand
from ddpm_jax.config import to_json
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import run_page
from ddpm_jax.storage import files, pictures


def written(*arguments):
    return pathlib.Path(run_page.write(*arguments)).read_text()


def embedded(text):
    return [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", text)]


def numbered(count):
    """Images that differ."""
    return np.random.default_rng(0).integers(0, 255, (count, 8, 8, 1), dtype=np.uint8)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my run"
    files.write_json(folder / "config.json", to_json(config()))
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": s, "loss": 1 / s, "images_per_second": 9.0}) + "\n" for s in (4, 12)))
    for step in (4, 8, 12):
        pictures.write_png(folder / "samples" / f"{step:08d}.png", pictures.tile(numbered(step)))
    return folder


def test_a_run_that_was_only_trained(run):
    text = written(run)
    grids = [pictures.decode_png(data) for data in embedded(text)]
    assert [pictures.untile(g, (8, 8, 1)).shape[:2] for g in grids] == [(2, 2), (3, 3), (3, 4)]
    assert "Trained for 12 of 12 steps" in text and "<td>0.083333</td>" in text
    assert re.findall(r'alt="(step \d+)"', text) == ["step 4", "step 8", "step 12"]
    assert not re.findall(r'(?:src|href)=["\'](?!data:)', text) and "http" not in text
    assert len(list(run.iterdir())) == 4        # nothing but the page was added


def test_denoising_nearest_images_and_numbers_of_other_commands(run):
    frames = numbered(3 * 5).reshape(3, 5, 8, 8, 1)
    pictures.write_png(run / "drawn" / "progressive.png", pictures.tile(
        frames.reshape(-1, 8, 8, 1), 5))
    files.write_json(run / "drawn" / "request.json", {"steps": 10})
    pictures.write_png(run / "judged" / "nearest_pixels.png", pictures.tile(numbered(4)))
    for step, bound in ((4, 9.0), (12, 3.5)):
        record = {"values": {"bpd_test": bound, "bpd_test_n": 7, "terms_test": [1.0]},
                  "provenance": {"seed": 0}}
        document = files.read_json(run / "judged" / "evaluation.json") if step == 12 else {}
        files.write_json(run / "judged" / "evaluation.json",
                         document | {str(step): {"paper": {"bound": record | {"values": {
                             k: v for k, v in record["values"].items() if k != "terms_test"}}}}})
    text = written(run)
    times = re.findall(r'alt="after (\d+) of 10 steps"', text)
    assert times == ["2", "4", "6", "8", "10"]
    last = pictures.untile(pictures.decode_png(embedded(text)[3 + 4]), (8, 8, 1))
    np.testing.assert_array_equal(last.reshape(-1, 8, 8, 1)[:3], frames[:, 4])
    assert "Nearest training images, in pixels" in text
    assert re.search(r"bpd_test</td><td>3.5</td><td>bits per dimension of the test images", text)


def test_the_next_commands_can_be_given(run):
    text = written(run)
    lines = [line.replace("&#x27;", "'") for line in re.findall("<pre>(ddpm .*?)</pre>", text)]
    assert len(lines) == 3 and "ddpm sample" in lines[0]
    decayed = to_json(config(**{"optimizer.decay_steps": 12}))     # its rate is 0 at step 12
    text = run_page._next(str(run), decayed, False, ["chain"], [{}], ["nearest"])
    lines += re.findall("<pre>(ddpm train .*?)</pre>", text.replace("&#x27;", "'"))
    assert len(lines) == 4 and "--config.optimizer.decay_steps=24" in lines[-1]
    for line in lines:
        words = shlex.split(line)
        assert f"--workdir={run}" in words or f"--workdir={run}-longer" in words
        _subcommand(*words[1:])     # parses
    assert "ddpm train" in written(run, "gs://b/run", to_json(
        config(**{"train.steps": 99})))


def test_a_page_has_room_for_some_grids_and_always_for_the_newest(run, monkeypatch):
    paths = sorted(map(str, (run / "samples").iterdir()))
    sizes = [len(data) for _, data in run_page._some(paths)]
    monkeypatch.setattr(run_page, "MOST_BYTES", sizes[-1])
    assert [path for path, _ in run_page._some(paths)] == [paths[0], paths[2]]
    monkeypatch.setattr(run_page, "MOST_BYTES", 0)
    assert [path for path, _ in run_page._some(paths)] == [paths[2]]


def test_a_damaged_file_is_named(run):
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation.json is not JSON"):
        run_page.write(run)
