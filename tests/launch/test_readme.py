"""launch/README.md and TROUBLESHOOTING.md name files, codes and messages that exist. Their commands
are parsed by tests/test_docs.py."""

import pathlib
import re

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
TEXT = (LAUNCH / "README.md").read_text()


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
