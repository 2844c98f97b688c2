"""One HTML file with everything inside: it opens without a network, a server or a plugin."""

import base64
import html
import json
import re

import numpy as np

from ddpm_jax.evaluation.measures import rate_distortion
from ddpm_jax.evaluation.metrics import value_prefixes
from ddpm_jax.storage.pictures import encode_png

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;
color:#1d2330;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ccd}
table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .7rem;border-bottom:1px solid #dde;text-align:left;vertical-align:top}
.PASS{color:#0a6b2c;font-weight:600}.FAIL{color:#a3122a;font-weight:600}.note{color:#667}
img{image-rendering:pixelated;max-width:100%}.frame{display:none}.frame.on{display:inline}
svg{background:#fafbfd;border:1px solid #dde}details{margin:.4rem 0}
pre{white-space:pre-wrap;font-size:12px;background:#f6f7fa;padding:.5rem}
"""
SCRIPT = """
document.querySelectorAll('.scrub').forEach(function (box) {
  var range = box.querySelector('input'), label = box.querySelector('output');
  var frames = box.querySelectorAll('.frame');
  function show() {
    frames.forEach(function (f, i) { f.classList.toggle('on', i === +range.value); });
    label.textContent = frames[+range.value].alt;
  }
  range.addEventListener('input', show);
  show();
  box.dataset.ready = 'yes';
});
"""
COLOURS = ("#2457c5", "#c2410c", "#0a7d4f", "#7c3aed", "#0e7490", "#a3122a")


def image(picture, alt="", *, css="", least_width=320) -> str:
    """An <img> with its bytes inside; small pictures are enlarged by whole pixels. picture: uint8
    [h,w,C], or the bytes of a PNG file."""
    if not isinstance(picture, bytes):
        picture = encode_png(picture)
    width = int.from_bytes(picture[16:20], "big")  # of the IHDR chunk, which comes first
    scale = max(1, -(-least_width // width))
    data = base64.b64encode(picture).decode()
    return (f'<img class="{css}" alt="{html.escape(alt)}" width="{width * scale}" '
            f'src="data:image/png;base64,{data}">')


def number(value) -> str:
    """A value as text, with five significant digits."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    return str(value)


def table(rows, header) -> str:
    """rows of cells; a cell that is PASS or FAIL is coloured."""
    def cell(tag, value):
        text = html.escape(number(value))
        css = f' class="{text}"' if text in ("PASS", "FAIL") else ""
        return f"<{tag}{css}>{text}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", h) for h in header) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", c) for c in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def curve(series: dict, *, x_label, y_label, log_x=False, log_y=False) -> str:
    """Lines as inline SVG. series: {name: [(x, y), ...]}; points that a logarithm cannot take and
    values that are not finite are left out."""
    def usable(p):
        return (np.isfinite(p).all() and (not log_x or p[0] > 0) and (not log_y or p[1] > 0))

    series = {k: [p for p in map(tuple, v) if usable(p)] for k, v in series.items()}
    series = {k: v for k, v in series.items() if v}
    if not series:
        return '<p class="note">nothing to draw yet</p>'
    scale_x = np.log10 if log_x else np.asarray
    scale_y = np.log10 if log_y else np.asarray
    xs = np.concatenate([scale_x([p[0] for p in v]) for v in series.values()]).astype(float)
    ys = np.concatenate([scale_y([p[1] for p in v]) for v in series.values()]).astype(float)
    x0, x1, y0, y1 = xs.min(), xs.max(), ys.min(), ys.max()
    width, height, left, low = 620, 300, 70, 40

    def place(x, y):
        across = (x - x0) / ((x1 - x0) or 1.0)
        up = (y - y0) / ((y1 - y0) or 1.0)
        return left + across * (width - left - 20), height - low - up * (height - low - 20)

    out = [f'<svg width="{width}" height="{height}" role="img">']
    for share in (0.0, 0.5, 1.0):
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        px, py = place(x, y)
        tx, ty = (10 ** x if log_x else x), (10 ** y if log_y else y)
        out.append(f'<text x="{px:.0f}" y="{height - low + 16}" font-size="11" '
                   f'text-anchor="middle">{tx:.4g}</text>'
                   f'<text x="{left - 6}" y="{py + 4:.0f}" font-size="11" '
                   f'text-anchor="end">{ty:.4g}</text>'
                   f'<path d="M{left} {py:.1f}H{width - 20}" stroke="#dde"/>')
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(float(scale_x(x)), float(scale_y(y))))
                        for x, y in points)
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>'
                   f'<text x="{left + 10}" y="{24 + 15 * i}" font-size="12" fill="{colour}">'
                   f"{html.escape(name)}</text>")
    out.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 6}" font-size="12" '
               f'text-anchor="middle">{html.escape(x_label)} ({html.escape(y_label)} upwards)'
               "</text></svg>")
    return "".join(out)


def scrubber(frames, labels, *, least_width=320) -> str:
    """Pictures to move through with a slider. frames: as ``image`` takes them; labels: one each."""
    shown = "".join(image(f, str(label), css="frame", least_width=least_width) for f, label in
                    zip(frames, labels, strict=True))
    return ('<div class="scrub"><input type="range" min="0" step="1" style="width:20rem" '
            f'max="{len(frames) - 1}" value="{len(frames) - 1}"> <output></output><br>'
            f"{shown}</div>")


def section(title, *parts) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def note(text) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def picture_sections(pictures: dict) -> list[str]:
    """{name: uint8 [h,w,C]} -> a section each."""
    return [section(name.replace("_", " "), image(p, name)) for name, p in pictures.items()]


def curve_sections(history: list[dict]) -> list[str]:
    """The lines of metrics.jsonl -> the loss, and the values of METRICS, against the step."""
    names = sorted({k for line in history for k in line if k != "step"})
    lines = {n: _thinned([(h["step"], h[n]) for h in history
                          if isinstance(h.get(n), int | float)]) for n in names}
    losses = {n: v for n, v in lines.items() if n.endswith("loss")}
    measured = {}       # numbered values, as of the parts of the chain, are in one picture
    for n, v in lines.items():
        if n.startswith(value_prefixes()) and not n.endswith(("_std_error", "_std")) and v:
            measured.setdefault(re.sub(r"_\d+$", "", n), {})[n] = v
    out = [section("Loss", curve(losses, x_label="step", y_label="loss", log_x=True, log_y=True))
           ] if any(losses.values()) else []
    return out + [section(n, curve(v, x_label="step", y_label=n)) for n, v in measured.items()]


def _thinned(points, most=400):
    """At most that many points: means over stretches of equal length of log(step)."""
    if len(points) <= most:
        return points
    points = np.array(points, float)
    places = np.log(np.maximum(points[:, 0], 1))
    bins = np.searchsorted(np.linspace(places[0], places[-1], most), places)
    counts = np.bincount(bins)
    sums = (np.bincount(bins, weights=points[:, k]) for k in (0, 1))
    x, y = (total[counts > 0] / counts[counts > 0] for total in sums)
    return list(zip(x, y, strict=True))


def evaluation_sections(document: dict) -> list[str]:
    """evaluation.json -> a table a record, its curves, its provenance."""
    out = []
    for step, by_protocol in document.items():
        for protocol, records in by_protocol.items():
            for label, record in records.items():
                values = record["values"]
                scalars = [(k, v) for k, v in sorted(values.items()) if not isinstance(v, list)]
                parts = [table(scalars, ("metric", "value"))]
                for split in ("test", "train"):
                    if f"terms_{split}" in values:
                        parts.append(rate_curve(values, split))
                facts = html.escape(json.dumps(record["provenance"], indent=1))
                parts.append(f"<details><summary>provenance</summary><pre>{facts}</pre></details>")
                out.append(section(f"step {step}, {protocol}: {label}", *parts))
    return out


def rate_curve(values, split) -> str:
    """RMSE against rate of one split's bound (Fig. 5, left and right in one)."""
    rate, rmse = rate_distortion(values[f"terms_{split}"], values[f"prior_{split}"],
                                 values[f"mse_{split}"])
    keep = np.unique(np.linspace(0, len(rate) - 1, 200).astype(int))
    return curve({f"distortion, RMSE in [0,255] ({split})": [(rate[i], rmse[i]) for i in keep]},
                 x_label="rate, bits/dim", y_label="RMSE")


def page(title: str, sections: list[str]) -> str:
    """The whole file. Nothing in it refers to another."""
    return ("<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
            f"<h1>{html.escape(title)}</h1>{''.join(sections)}<script>{SCRIPT}</script>"
            "</body></html>")
