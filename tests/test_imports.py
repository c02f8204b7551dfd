"""No import circle anywhere in the package, imports inside of functions included."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "rnndyn_fast"


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, at its top or in a function; those for type checkers alone are left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                submodules = {f"{child.module}.{alias.name}" for alias in child.names} & modules
                found.update(submodules or {child.module or ""})
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of a graph, one for each edge back that a depth-first walk finds."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def test_no_import_circle() -> None:
    names = {path: ".".join(("rnndyn_fast", *path.relative_to(ROOT).with_suffix("").parts)) for path in ROOT.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for path, name in names.items()}
    assert circles({name: imports(path, set(files)) - {name} for name, path in files.items()}) == []
