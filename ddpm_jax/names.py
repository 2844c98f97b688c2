"""What help and shell completion list, read from the source files: importing the modules that hold
the tables would import JAX, which takes longer than a help text should."""

import ast
import io
import pathlib
import tokenize
from typing import NamedTuple

PACKAGE = pathlib.Path(__file__).parent
CONFIGS = PACKAGE / "configs"


def packaged_configs() -> list[str]:
    return sorted(p.stem for p in CONFIGS.glob("*.py") if not p.stem.startswith("_"))


def table(file: str, name: str) -> list[str]:
    """The keys of the dict literal ``name`` in a file of the package."""
    for node in ast.parse((PACKAGE / file).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return [key.value for key in node.value.keys]
    raise LookupError(f"{file} has no dict literal {name}")


class Field(NamedTuple):
    """A field of a config: 'train.steps', its default as it is written, its comment or ''."""

    name: str
    default: str
    comment: str


def config_fields() -> list[Field]:
    """Every field of configs/default.py, in order."""
    text = (CONFIGS / "default.py").read_text()
    comments = _comments(text)
    config, = (node.args[0] for node in ast.walk(ast.parse(text))
               if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ConfigDict")

    def walk(call, prefix):
        for keyword in call.keywords:
            name, value = prefix + keyword.arg, keyword.value
            if isinstance(value, ast.Call) and value.func.id == "dict":
                yield from walk(value, name + ".")
            else:
                unset = isinstance(value, ast.Call) and value.func.id == "placeholder"
                yield Field(name, "None" if unset else ast.get_source_segment(text, value),
                            comments.get(value.end_lineno, ""))

    return list(walk(config, ""))


def _comments(text) -> dict[int, str]:
    """{line: comment}; one that is alone on its line continues the one above."""
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
