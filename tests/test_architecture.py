"""Imports run one way, and every function stays of a size that can be read."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("treespec_jax", "pallas_kernels")
# Rooms of treespec_jax from the ground up; one may import those of lines above its own.
FLOORS = (
    ("errors", "interrupts", "pace"),
    ("adaptive", "branches", "checks", "distributed"),
    ("params",),
    ("config",),
    ("sharding", "trees"),
    ("models",),
    ("cache", "sampling", "checkpoints"),
    ("drafting", "acceptance"),
    ("limits", "disk_cache"),
    ("speculation",),
    ("engine",),
    ("tracing", "worker", "cost_file"),
    ("completions", "progress", "stops"),
    ("texts", "arguments", "pairs"),
    ("beam_texts",),
    ("llm",),
    ("exploration", "branch", "tuning", "training"),
    ("measurement",),
    ("commands",),
    ("cli",),
)
# What must not be reached, by any way that an import takes.
FORBIDDEN = {
    "pallas_kernels": ("treespec_jax",),
    "treespec_jax.engine.scheduler": ("jax",),
    "treespec_jax.engine.beam_group": ("jax",),
    "treespec_jax.engine.branching": ("jax",),
    "treespec_jax.engine": ("treespec_jax.checkpoints",),
    "treespec_jax.drafting": ("treespec_jax.acceptance",),
    "treespec_jax.models": ("treespec_jax.drafting",),
    "treespec_jax.limits": ("jax",),
    "treespec_jax.checkpoints.formats": ("jax",),
    "treespec_jax.checkpoints.recycle_table": ("jax",),
    "treespec_jax.measurement": ("treespec_jax.commands",),
}
LONGEST, WIDEST = 80, 6


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that import statements below `tree` name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the room that they go to"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules() else node.module


def at_start(tree: ast.Module) -> Iterator[str]:
    """The same of statements that run when a module is imported."""
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from imported(node)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@functools.cache
def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def test_imports_run_down():
    """No room imports one of its own floor or above it, whenever that runs."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    wrong = []
    for name, tree in modules().items():
        if not within(name, "treespec_jax") or not room(name):
            continue
        for other in imported(tree):
            if not within(other, "treespec_jax") or room(other) in (room(name), ""):
                continue
            if floor[room(other)] >= floor[room(name)]:
                wrong.append(f"{name} -> {other}")
    assert not wrong


def test_no_circle_among_modules():
    """Of imports that run at the start."""
    seen, under_way = set(), []

    def visit(name):
        assert name not in under_way, [*under_way, name]
        if name in seen or name not in modules():
            return
        under_way.append(name)
        for other in at_start(modules()[name]):
            if other != name:
                visit(other)
        under_way.pop()
        seen.add(name)

    for name in modules():
        visit(name)


def reach(start: list[str]) -> dict[str, str]:
    """All that importing some modules imports, and who does."""
    found, left = {}, list(start)
    while left:
        name = left.pop()
        for other in at_start(modules()[name]) if name in modules() else ():
            if other not in found:
                found[other] = name
                left.append(other)
    return found


@pytest.mark.parametrize("start", FORBIDDEN)
def test_what_must_not_be_reached(start):
    names = [name for name in modules() if within(name, start)]
    assert names, "there is no such module: a dead test"
    found = reach(names)
    for forbidden in FORBIDDEN[start]:
        wrong = {o: by for o, by in found.items() if within(o, forbidden)}
        assert not wrong


def functions() -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Name, function, and whether it is public and not of a class within a kernel."""
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}:{node.name}", node


def test_no_function_is_too_long():
    """But for kernels, whose steps share their buffers."""
    files = "tpu", "gpu", "ring", "reference"
    kernels = tuple(f"pallas_kernels.tree_attention.{name}" for name in files)
    sizes = {
        where: node.end_lineno - node.lineno + 1
        for where, node in functions()
        if not where.startswith(kernels)
    }
    assert not {where: size for where, size in sizes.items() if size > LONGEST}


# Entry points whose arguments are their users' settings.
MANY = {
    "treespec_jax.checkpoints.conversion:convert",
    "treespec_jax.checkpoints.loading:load",
    "treespec_jax.llm:__init__",
    "treespec_jax.models.transformer:__call__",
}


def test_no_function_takes_too_many_arguments():
    wide = {}
    for where, node in functions():
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        names += [a.arg for a in node.args.kwonlyargs]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > WIDEST and where not in MANY:
            wide[where] = count
    assert not wide


def test_no_test_imports_another_test():
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
                parts = {
                    part
                    for n in names
                    if n.startswith("tests.")
                    for part in n.split(".")
                }
                if any(part.startswith("test_") for part in parts):
                    wrong.append(f"{path.name} -> {node.module}")
    assert not wrong
