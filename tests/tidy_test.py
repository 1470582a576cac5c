"""Checks the shape of the code itself: layers, cores and shells, sizes, dead files.

A rule that is not a test is a wish.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "geomirror"
FUNCTION_LINES_MAX = 50
FILE_LINES_MAX = 400

# Lowest first. A module may import its own package and any layer strictly below it.
LAYERS: list[set[str]] = [
    {"environment"},
    {"errors"},
    {"limits"},
    {"config", "volume", "nbd", "tunnel", "routing", "cluster"},
    {"wan_protocol"},
    {"node"},
    {"lab"},
    {"cli"},
    {"__main__", "__init__"},
]
# Only shells (*_io.py), the composition root, the command line and environment.py touch the world.
WORLD = {
    "aiohttp",
    "asyncio",
    "ctypes",
    "multiprocessing",
    "os",
    "queue",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "time",
    "urllib.request",
}
WORLD_ALLOWED = {"node", "cli", "lab", "environment", "__main__"}


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    return {
        ".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p
        for p in sorted(ROOT.rglob("*.py"))
    }


@functools.cache
def nodes(path: pathlib.Path) -> tuple[ast.AST, ...]:
    """All of a file's syntax; parsed once for all rules."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imports(path: pathlib.Path) -> set[str]:
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module or ""}
    return found


@functools.cache
def lazy_names(path: pathlib.Path) -> set[str]:
    """Modules named in string constants: how the command line loads its groups lazily."""
    return {
        node.value
        for node in nodes(path)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("geomirror.")
    }


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def rank(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if package(module) in names)


def is_shell(module: str) -> bool:
    return module.endswith("_io") or package(module) in WORLD_ALLOWED


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    known = modules()
    for target in imports(known[module]):
        if target in known and package(target) not in (package(module), "__init__"):
            assert rank(target) < rank(module), f"{module} imports {target}, which is not below it"


@pytest.mark.parametrize("module", modules())
def test_only_shells_touch_the_world(module: str) -> None:
    if is_shell(module):
        return
    path = modules()[module]
    for target in imports(path) - guarded_imports(path):
        assert target.split(".")[0] not in WORLD, f"{module} is a core but imports {target}"
        assert not target.endswith("_io"), f"{module} is a core but imports the shell {target}"


def test_no_import_cycles() -> None:
    known = modules()
    graph = {m: {t for t in imports(p) if t in known and t != m} for m, p in known.items()}
    typing_only = {m: guarded_imports(p) for m, p in known.items()}
    graph = {m: targets - typing_only[m] for m, targets in graph.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


@functools.cache
def guarded_imports(path: pathlib.Path) -> set[str]:
    """Imports under `if TYPE_CHECKING`, which do not exist when the program runs."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in ast.walk(node):
                if isinstance(child, ast.Import):
                    found |= {alias.name for alias in child.names}
                elif isinstance(child, ast.ImportFrom):
                    found |= {f"{child.module}.{a.name}" for a in child.names}
                    found.add(child.module or "")
    return found


@pytest.mark.parametrize("module", modules())
def test_files_and_functions_stay_small(module: str) -> None:
    path = modules()[module]
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES_MAX, f"{module}: file over {FILE_LINES_MAX} lines"
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{module}.{node.name}: {lines} lines"


def test_no_dead_files() -> None:
    paths = modules().values()
    used = set().union(*(imports(p) for p in paths), *(lazy_names(p) for p in paths))
    used |= {"geomirror.__main__"}
    dead = [m for m, p in modules().items() if m not in used and p.name != "__init__.py"]
    assert dead == []


def test_no_relics() -> None:
    banned = ("TO" + "DO", "FIX" + "ME", "X" + "XX", "breakpoint" + "()")
    for module, path in modules().items():
        text = path.read_text()
        for word in banned:
            assert word not in text, f"{module}: {word}"


def test_only_supervisors_catch_everything() -> None:
    supervisors = {"geomirror.node.calls", "geomirror.cli.main"}
    for module, path in modules().items():
        for node in nodes(path):
            if isinstance(node, ast.ExceptHandler) and module not in supervisors:
                name = ast.unparse(node.type) if node.type else ""
                assert name != "Exception", f"{module}:{node.lineno} catches Exception"
                if name in ("", "BaseException"):
                    ends = node.body[-1]
                    assert isinstance(ends, ast.Raise), f"{module}:{node.lineno} swallows"


def test_connected_sockets_are_handed_over_in_one_place() -> None:
    """`geomirror.tunnel.handover_io` says what goes wrong elsewhere."""
    hands = {"create_connection", "create_unix_connection", "open_connection"}
    hands |= {"open_unix_connection"}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                takes = node.func.attr in hands and any(k.arg == "sock" for k in node.keywords)
                assert not takes, f"{module}:{node.lineno}: use connect_stream"


def test_assertions_are_on() -> None:
    assert sys.flags.optimize == 0
