"""The commands of launch/README.md: each flag and file in them exists."""

import importlib.util
import pathlib
import re
import shlex

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
TEXT = (LAUNCH / "README.md").read_text()
PARSERS = {"tpu.py": "cloud_tpu/__main__.py"}
JOINED = TEXT.replace("\\\n", " ")


def module(path):
    spec = importlib.util.spec_from_file_location(f"launch_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def commands(program):
    """Command lines that name `program`, without the optional parts and what follows a pipe."""
    for line in JOINED.splitlines():
        if line.startswith("    ") and f"python launch/{program}" in line:
            line = line.split(" | ")[0].replace("...", "x")
            yield shlex.split(line.replace("[", "").replace("]", ""))[2:]


@pytest.mark.parametrize("program, least", [("tpu.py", 2), ("local.py", 2), ("gke/render.py", 3)])
def test_commands_parse(program, least):
    loaded = module(LAUNCH / PARSERS.get(program, program))
    found = list(commands(program))
    assert len(found) >= least
    for words in found:
        for what in (words[0].split("|") if program == "tpu.py" else [None]):
            loaded.parse(([what] if what else words[:1]) + words[1:])


def test_files_and_codes_exist():
    for path in re.findall(r"launch/[\w./]+\w", TEXT):
        assert (LAUNCH.parent / path).exists(), path
    from ddpm_jax.parallel import exit_codes
    for code in (exit_codes.EXIT_RESTART, exit_codes.EXIT_LOST, exit_codes.EXIT_HUNG,
                 exit_codes.EXIT_UNREACHABLE):
        assert re.search(rf"^\| [\d, ]*\b{code}\b", TEXT, re.MULTILINE), code


def test_troubleshooting_quotes_messages_that_the_programs_print():
    page = (LAUNCH / "TROUBLESHOOTING.md").read_text()
    sources = "".join(p.read_text() for p in [
        *LAUNCH.rglob("*.py"), LAUNCH / "host.sh", *(LAUNCH.parent / "ddpm_jax").rglob("*.py")])
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    for ours in ("no coordinator at", "nothing listens", "is unknown here", "hosts differ",
                 "watchdog: no step for", "restarts without a new checkpoint",
                 "another command runs under it",
                 "needs the role TPU Admin", "no quota for", "belongs to a run with another config",
                 "must be a multiple or a divisor of the"):
        assert ours in page and ours in sources, ours
