"""Write docs/configuration.md from configs/default.py: python docs/make_configuration.py"""

import ast
import io
import pathlib
import sys
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAD = """# Configuration

Written by `python docs/make_configuration.py` from [configs/default.py](../configs/default.py); do
not edit. Every field there is, with the paper's CIFAR-10 value. Set one with
`--config.SECTION.FIELD=VALUE`.
"""


def comments(text):
    """{line number: comment}; a comment alone on its line continues the one above."""
    found, last = {}, None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("# ")
            if token.line.lstrip().startswith("#") and last in found:
                found[last] += " " + words
            else:
                last = token.start[0]
                found[last] = words
    return found


def fields(text):
    """(name, value as written, comment) of each field of the ConfigDict in the file, in order."""
    notes = comments(text)
    config, = (node.args[0] for node in ast.walk(ast.parse(text))
               if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ConfigDict")

    def walk(call, prefix):
        for keyword in call.keywords:
            name, value = prefix + keyword.arg, keyword.value
            if isinstance(value, ast.Call) and value.func.id == "dict":
                yield from walk(value, name + ".")
            else:
                empty = isinstance(value, ast.Call) and value.func.id == "placeholder"
                yield (name, "None" if empty else ast.get_source_segment(text, value),
                       notes.get(value.end_lineno, ""))

    return walk(config, "")


def page(text):
    lines, section = [HEAD], None
    for name, value, note in fields(text):
        group = name.partition(".")[0] if "." in name else ""
        if group != section:
            section = group
            lines.append(f"\n## {section or 'The run'}\n\n| field | value | |\n|---|---|---|\n")
        note = note.replace("|", "\\|")
        lines.append(f"| `{name}` | `{value}` | {note} |\n")
    return "".join(lines)


if __name__ == "__main__":
    out = page((ROOT / "configs/default.py").read_text())
    (ROOT / "docs/configuration.md").write_text(out)
    print(f"docs/configuration.md: {out.count(chr(10))} lines", file=sys.stderr)
