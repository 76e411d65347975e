"""The rules of the design that a reader would otherwise have to keep: who imports whom, and how large things grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "launcher").rglob("*.py"), *(ROOT / "trainers").rglob("*.py")])
NAMES = {path: path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in FILES}

HEAVY = {"torch", "ray", "timm", "torchvision", "sklearn", "safetensors", "kubernetes", "pandas"}

ORDER = (
    ("errors",),
    ("labels", "section", "storage", "s3", "catalog", "site"),
    ("space",),
    ("spec",),
    ("cluster",),
    ("journal", "runs", "specfile", "pools", "layout", "sweeps", "sweeping", "families", "schedule"),
    ("plan", "mirror", "diagnose.observed"),
    ("manifest", "diagnose.scheduling", "diagnose.queueing"),
    ("capacity", "diagnose.pods"),
    ("diagnose",),
    ("preflight", "scene", "doctor", "leaks", "tunnel"),
    ("backends", "backends.local", "backends.supervisor", "backends.kuberay"),
    ("show",),
    ("show_sweep", "show_schedule"),
    ("where",),
    ("manage",),
    ("operate", "datasets"),
    ("bench_data",),
    ("cli",),
    ("__main__",),
)
"""Modules of `launcher`, each of which imports only from rows above its own, or its own row."""

CLIENT = "launcher.cluster"
"""The one module that knows the Kubernetes client, in its functions."""

REACH_TRAINERS = {"launcher.manage", "launcher.preflight", "launcher.datasets", "launcher.bench_data"}
"""Where the control plane calls the data plane: for the index, the report, `predict` and `data`, inside functions."""

SHARED = {"errors", "section", "space", "spec", "sweeps", "runs", "storage", "journal", "s3", "catalog", "__init__"}
"""What the data plane may know of the control plane: the spec, the run directory, and where its caches are."""


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_import_time(tree: ast.Module) -> ast.Module:
    """The module without the bodies of functions and of `if TYPE_CHECKING`."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, _node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            hint = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if hint else self.generic_visit(node)

    cut: ast.Module = Cut().visit(tree)
    return cut


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _ours(path: Path) -> set[str]:
    """Modules of `launcher` that the file imports, anywhere, without the package's name."""
    known = {name.removeprefix("launcher.").removesuffix(".__init__") for name in NAMES.values()}
    found = {name.removeprefix("launcher.") for name in _imports(_tree(path)) if name.startswith("launcher.")}
    return found & known


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_a_file_and_its_functions_fit_on_a_few_screens(path: Path) -> None:
    tree = _tree(path)
    assert len(path.read_text().splitlines()) <= 400
    long = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 60
    ]
    assert long == []


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_a_file_says_what_it_is_for(path: Path) -> None:
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")
    assert ast.get_docstring(_tree(path))


@pytest.mark.parametrize("path", [path for path in FILES if NAMES[path].startswith("launcher.")], ids=NAMES.get)
def test_the_control_plane_loads_nothing_heavy_and_reaches_the_data_plane_in_functions_only(path: Path) -> None:
    name = NAMES[path]
    anywhere = {module.partition(".")[0] for module in _imports(_tree(path))}
    assert not anywhere & (HEAVY - {"kubernetes"} if name == CLIENT else HEAVY)
    assert "trainers" not in anywhere or name in REACH_TRAINERS
    at_once = {module.partition(".")[0] for module in _imports(_at_import_time(_tree(path)))}
    assert "trainers" not in at_once
    assert "boto3" not in at_once
    assert "botocore" not in at_once
    assert "kubernetes" not in at_once


@pytest.mark.parametrize("path", [path for path in FILES if NAMES[path].startswith("trainers.")], ids=NAMES.get)
def test_the_data_plane_knows_only_the_spec_and_the_run_directory(path: Path) -> None:
    assert _ours(path) <= SHARED


@pytest.mark.parametrize("path", [path for path in FILES if NAMES[path].startswith("launcher.")], ids=NAMES.get)
def test_nothing_imports_backwards(path: Path) -> None:
    name = NAMES[path].removeprefix("launcher.").removesuffix(".__init__")
    if name == "__init__":
        assert not _ours(path)
        return
    (rank,) = (number for number, row in enumerate(ORDER) if name in row)
    assert _ours(path) - {name} <= {module for row in ORDER[: rank + 1] for module in row}
