"""Write docs/configuration.md from configs/default.py: python docs/make_configuration.py"""

import pathlib
import sys

from ddpm_jax.names import config_fields

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAD = """# Configuration

Written by `python docs/make_configuration.py` from [configs/default.py](../configs/default.py); do
not edit. Every field there is, with the paper's CIFAR-10 value. Set one with
`--config.SECTION.FIELD=VALUE`.
"""


def page():
    lines, section = [HEAD], None
    for name, value, note in config_fields():
        group = name.partition(".")[0] if "." in name else ""
        if group != section:
            section = group
            lines.append(f"\n## {section or 'The run'}\n\n| field | value | |\n|---|---|---|\n")
        note = note.replace("|", "\\|")
        lines.append(f"| `{name}` | `{value}` | {note} |\n")
    return "".join(lines)


if __name__ == "__main__":
    out = page()
    (ROOT / "docs/configuration.md").write_text(out)
    print(f"docs/configuration.md: {out.count(chr(10))} lines", file=sys.stderr)
