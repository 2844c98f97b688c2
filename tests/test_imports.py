"""The import direction: exactly these arrows, no cycle, none hidden in functions."""

import ast
import graphlib
import pathlib

import ddpm_jax

ROOT = pathlib.Path(ddpm_jax.__file__).parent

# package or top-level module -> what of ours it imports, besides errors
ARROWS = {
    "diffusion": set(),
    "models": set(),
    "storage": set(),
    "formats": {"storage"},
    "training": set(),
    "parallel": set(),
    "compilation": {"models", "storage"},
    "data": {"formats", "storage"},
    "names": set(),
    "config": {"diffusion", "names", "storage"},
    "config_checks": {"config", "data", "diffusion", "models", "parallel", "training"},
    "experiment": {"config_checks", "diffusion", "models", "parallel", "training"},
    "start_line": {"compilation", "config_checks", "experiment", "models"},
    "checkpoints": {"config", "parallel", "storage"},
    "run_log": {"storage"},
    "init_from": {"checkpoints", "config", "experiment", "storage", "training"},
    "programs": {"config_checks", "data", "diffusion", "experiment", "parallel", "training"},
    "interchange": {"checkpoints", "config", "diffusion", "experiment", "formats", "models",
                    "storage", "training"},
    "evaluation": {"data", "experiment", "formats", "parallel", "programs", "run_log", "storage",
                   "training"},
    "sample": {"checkpoints", "compilation", "config", "data", "evaluation", "experiment",
               "formats", "parallel", "programs", "run_log", "start_line", "storage"},
    "edit": {"checkpoints", "data", "diffusion", "experiment", "parallel", "programs", "run_log",
             "sample", "storage"},
    "train": {"checkpoints", "compilation", "config", "config_checks", "data", "experiment",
              "init_from", "parallel", "programs", "run_log", "start_line", "storage", "training"},
    "plan": {"checkpoints", "compilation", "config", "config_checks", "experiment", "parallel",
             "reproduction", "run_log", "start_line", "storage"},
    "wandb_sink": {"storage"},
    "benchmark": {"compilation", "data", "diffusion", "evaluation", "experiment", "interchange",
                  "programs", "start_line", "storage", "training"},
    "doctor": {"config", "data", "diffusion", "parallel", "storage", "train", "training"},
    "reproduction": {"checkpoints", "compilation", "config", "config_checks", "data", "diffusion",
                     "evaluation", "experiment", "parallel", "programs", "run_log", "sample",
                     "storage", "train", "training"},
    "api": {"compilation", "config", "diffusion", "evaluation", "experiment", "interchange",
            "parallel", "programs", "run_log", "sample", "storage", "train", "training"},
    "cli": {"benchmark", "checkpoints", "compilation", "config", "config_checks", "data", "doctor",
            "edit", "evaluation", "formats", "interchange", "names", "parallel", "plan",
            "reproduction", "run_log", "sample", "storage", "train", "wandb_sink"},
    "__main__": {"cli"},
}
# What the pure core may import from outside.
FOREIGN = {"diffusion": {"jax", "numpy", "math", "typing", "collections", "functools"},
           "models": {"jax", "jaxlib", "flax", "math", "hashlib", "typing", "functools",
                      "collections", "sys"}}


def imports(path):
    """(module, column) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.col_offset) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{a.name}", node.col_offset) for a in node.names)


def files():
    """{part: its files}; the configs are the user's."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        if part not in ("configs", "__init__"):
            found.setdefault(part, []).append(path)
    return found


def ours(path):
    """Names of our packages and modules that a file imports, without itself and errors."""
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    names = {name.split(".")[1] for name, _ in imports(path) if name.startswith("ddpm_jax.")}
    return names - {part, "errors", "configs", "__version__"}


def test_the_arrows_are_exactly_these():
    drawn = {part: set().union(*map(ours, paths)) for part, paths in files().items()
             if part != "errors"}
    assert drawn == ARROWS


def test_there_is_no_cycle_between_packages_or_modules():
    list(graphlib.TopologicalSorter(ARROWS).static_order())
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
               for paths in files().values() for path in paths}
    graph = {}
    for name, path in modules.items():
        found = (n.removeprefix("ddpm_jax.") for n, _ in imports(path) if n.startswith("ddpm_jax."))
        graph[name] = {m for n in found for m in (n, n.rpartition(".")[0]) if m in modules} - {name}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_our_modules_are_imported_at_the_top():
    """But for subcommands, of which a command imports only its own."""
    hidden = [f"{path.relative_to(ROOT)}: {name}"
              for part, paths in files().items() if part != "cli"
              for path in paths for name, column in imports(path)
              if column and name.startswith("ddpm_jax")]
    assert not hidden, "\n".join(hidden)


def test_the_core_depends_on_little():
    wrong = [f"{path.relative_to(ROOT)} imports {name}"
             for part, allowed in FOREIGN.items() for path in files()[part]
             for name, _ in imports(path) if name.split(".")[0] not in {*allowed, "ddpm_jax"}]
    assert not wrong, "\n".join(wrong)


def test_config_dicts_are_known_to_few():
    knowing = {path.relative_to(ROOT).as_posix() for paths in files().values() for path in paths
               if any(name.startswith("ml_collections") for name, _ in imports(path))}
    assert knowing == {"cli/common.py", "config.py", "experiment.py"}
