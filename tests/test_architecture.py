"""The rules of the rooms (docs/design.md), held against the imports."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "language_model"
GROUND = ("files", "terminal", "startup")  # modules that every folder stands on
FOLDERS = ("model", "data", "training", "runs", "pages", "sweeps")  # each imports only from those before it
MODULES = {file.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(file.read_text("utf-8"))
           for file in PACKAGE.rglob("*.py")}  # fmt: skip


def imports(module: str) -> set[str]:
    """Return what a module imports of the package, as ``data/windows``; of a folder, its ``__init__``."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "language_model":
            parent = "/".join(node.module.split(".")[1:])
            for name in node.names:
                options = f"{parent}/{name.name}".lstrip("/"), parent, f"{parent}/__init__".lstrip("/")
                found.add(next(option for option in options if option in MODULES))
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_a_folder_imports_only_from_those_below_it(module: str) -> None:
    own = module.split("/")[0]
    above_ground = {*GROUND, *FOLDERS[: FOLDERS.index(own) + 1]} if own in FOLDERS else {*GROUND}
    allowed = {"model"} if own == "model" else above_ground
    above = {name for name in imports(module) if name.split("/")[0] not in allowed}
    assert not above, f"{module} must not import {above}"


def test_no_module_imports_itself_through_others() -> None:
    list(TopologicalSorter({module: imports(module) for module in MODULES}).static_order())  # raises for a cycle


def test_only_runs_and_sweeps_know_hydra() -> None:
    for module, tree in MODULES.items():
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert module.split("/")[0] in ("runs", "sweeps") or not any(name.split(".")[0] == "hydra" for name in names)


def test_files_and_functions_stay_short() -> None:
    for module, tree in MODULES.items():
        lines = (PACKAGE / f"{module}.py").read_text("utf-8").count("\n")
        assert lines <= 330, f"{module}.py has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, f"{module}.py: {node.name} has over 45 lines"


def test_the_design_page_names_every_module() -> None:
    page = (PACKAGE.parents[1] / "docs" / "design.md").read_text("utf-8")
    for module in MODULES:
        name = module.removesuffix("/__init__").split("/")[-1]
        assert name in page, f"docs/design.md does not name {module}"
