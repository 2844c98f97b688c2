"""The import direction: each layer may import only the ones below it."""

import ast
import pathlib

import ddpm_jax

ROOT = pathlib.Path(ddpm_jax.__file__).parent

# package or module -> what of ours it may import (prefixes), besides itself and errors
MAY = {
    "diffusion": set(),
    "models": set(),
    "training": {"training", "compilation.cache"},
    "parallel": set(),
    "data": {"metrics", "folders"},
    "metrics": set(),
    "folders": set(),
    "checkpoints": {"config", "parallel.runners"},
    "interchange": {"checkpoints", "folders", "models", "diffusion", "experiment",
                    "training.optimizer", "training.steps"},
    "evaluation": {"diffusion", "parallel"},
    "compilation": {"models", "parallel", "diffusion", "evaluation"},
}
FOREIGN = {"diffusion": {"jax", "numpy", "math", "typing", "collections"},
           "models": {"jax", "flax", "math", "typing", "functools"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{a.name}" for a in node.names)


def files(part):
    folder = ROOT / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_import_direction():
    wrong = []
    for part, allowed in MAY.items():
        for path in files(part):
            for name in imports(path):
                if not name.startswith("ddpm_jax.") or name.startswith("ddpm_jax.errors"):
                    continue
                inner = name.removeprefix("ddpm_jax.")
                if not inner.startswith((part, *allowed)):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_core_depends_on_little():
    wrong = [f"{path.relative_to(ROOT)} imports {name}"
             for part, allowed in FOREIGN.items() for path in files(part) for name in imports(path)
             if name.split(".")[0] not in {*allowed, "ddpm_jax"}]
    assert not wrong, "\n".join(wrong)


def test_only_experiment_and_above_know_configs():
    for part in MAY:
        for path in files(part):
            assert "ml_collections" not in path.read_text() or part == "interchange", path
