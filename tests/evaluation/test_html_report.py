"""One file, nothing from outside; its slider works in a real browser."""

import base64
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.evaluation import html_report


def frames(n=5):
    return [np.full((4, 6, 3), 50 * i, np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def page():
    document = {"7": {"paper": {"ema <b>": {
        "values": {"bpd_test": 3.7500001, "fid_n": 50000, "terms_test": [1.0, 0.5, 0.1],
                   "mse_test": [0.1, 0.2, 0.5], "prior_test": 0.01},
        "provenance": {"seed": 0, "note": "<script>alert(1)</script>"}}}}}
    history = [{"step": s, "loss": 1 / s, "bpd_test": 4.0} for s in (1, 10, 100)]
    return html_report.page("Title & more", [
        *html_report.evaluation_sections(document), *html_report.curve_sections(history),
        *html_report.picture_sections({"nearest_pixels": frames()[1]}),
        html_report.section("along", html_report.scrubber(
            frames(), [f"frame {i}" for i in range(5)])),
        html_report.section("verdicts", html_report.table(
            [["x", "PASS"], ["y", "FAIL"]], ("a", "b")))])


def test_nothing_refers_to_anything_outside(page):
    assert not re.findall(r'(?:src|href)=["\'](?!data:)', page)
    assert "http" not in page and "@import" not in page and "url(" not in page


def test_text_is_escaped_and_numbers_are_short(page):
    assert "Title &amp; more" in page and "ema &lt;b&gt;" in page
    assert "<script>alert" not in page and "3.75<" in page and "50,000" in page
    assert 'class="PASS">PASS' in page and 'class="FAIL">FAIL' in page


def test_pictures_are_inside_bit_for_bit(page):
    data = re.findall(r"data:image/png;base64,([^\"]+)", page)
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[0]))))
    np.testing.assert_array_equal(found, frames()[1])


def test_curves_have_the_points_that_their_scales_can_take():
    drawn = html_report.curve({"a": [(0, 1.0), (1, 2.0), (10, float("nan")), (100, 3.0)]},
                         x_label="x", y_label="y", log_x=True)
    points, = re.findall(r'points="([^"]+)"', drawn)
    assert len(points.split()) == 2
    assert "nothing to draw" in html_report.curve({"a": []}, x_label="x", y_label="y")


@pytest.mark.slow
def test_slider_in_a_real_browser_without_a_network(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    if browser is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    move = ("<script>var r=document.querySelector('.scrub input');r.value=2;"
            "r.dispatchEvent(new Event('input'));</script></body>")
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", move))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~",
         f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000", "--dump-dom",
         file.as_uri()], capture_output=True, text=True, timeout=120)
    dom = done.stdout
    assert 'data-ready="yes"' in dom, done.stderr[-2000:]
    shown = re.findall(r'class="frame on" alt="([^"]+)"', dom)
    assert shown == ["frame 2"] and ">frame 2</output>" in dom
