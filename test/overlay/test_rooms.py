"""The overlay's own modules import each other in no circle, be it where a module begins, in a function, or by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "gpytorch"


def name_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def mentioned(file: Path, module: str) -> Iterator[str]:
    """Yield what a module imports, or names in full: `gpytorch.dense.decide`, say."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node)


def imports(root: Path) -> dict[str, set[str]]:
    """Return the modules of a package that each of them imports. A package stands for its own `__init__` alone."""
    files = {name_of(file, root): file for file in root.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        found = set()
        for name in mentioned(file, module):
            while name and name not in files:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {"", root.name, module}
    return graph


def test_no_module_imports_itself_by_way_of_others() -> None:
    order = [*TopologicalSorter(imports(ROOT)).static_order()]
    assert order.index("gpytorch.closed_form.matrix") < order.index("gpytorch.dense") < len(order)


@pytest.mark.parametrize(
    "text",
    ["from .b import x", "from . import b", "def f():\n    from .b import x", "import p\n\ndef f():\n    return p.b.x"],
)
def test_circle_is_found_wherever_it_is_closed(text: str, tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text(text)
    (package / "b.py").write_text("from .a import f\n\nx = 1\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(package)).prepare()
