"""Imports point one way, the rules do no I/O, and private names of libraries are few and in one place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import aiosqlite
import pytest

ROOT = Path(__file__).parent.parent
# What each module of bemore/ imports from there.
ARROWS: dict[str, set[str]] = {
    "access": set(),
    "anchors": {"sounds"},
    "api": {"access", "counsellor", "refusals", "settings", "storage"},
    "attempts": {"counsellor"},
    "care": {"anchors", "sounds"},
    "client": set(),
    "connections": set(),
    "conversation": {"counsellor", "failures", "outbox"},
    "counsellor": set(),
    "database_url": {"storage"},
    "demo": {"counsellor"},
    "event_stream": {"attempts", "counsellor"},
    "failures": set(),
    "gemini": {"attempts", "gemini_stream", "model_client"},
    "gemini_stream": {"event_stream"},
    "log": set(),
    "model_client": {"attempts", "counsellor", "event_stream"},
    "openai": {"attempts", "event_stream", "model_client"},
    "outbox": {"failures"},
    "postgres": {"database_url", "postgres_start", "storage"},
    "postgres_start": {"storage", "tables"},
    "refusals": {"access", "connections", "log", "settings", "storage"},
    "retention": {"storage"},
    "risk_marks": {"log", "storage"},
    "settings": set(),
    "sounds": set(),
    "sqlite": {"storage", "tables"},
    "storage": {"counsellor"},
    "tables": set(),
}
# Private names of libraries that the product uses, with the module that uses each and what must have it.
PRIVATE: dict[str, tuple[str, object]] = {"_execute": ("sqlite", aiosqlite.Connection)}
DOCUMENTED = {"_replace"}  # of a named tuple
PRODUCT = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "bemore").glob("*.py")}
PRODUCT["bemore_voice"] = ast.parse((ROOT / "bemore_voice.py").read_text(encoding="utf-8"))


def imports_of(module: ast.AST) -> Iterator[str]:
    for node in ast.walk(module):
        match node:
            case ast.ImportFrom(module="bemore", names=aliases):
                yield from (f"bemore.{alias.name}" for alias in aliases)
            case ast.ImportFrom(module=name):
                yield str(name)
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)


def test_modules_import_what_the_table_says() -> None:
    imported = {
        name: {each.removeprefix("bemore.") for each in imports_of(module) if each.startswith("bemore")}
        for name, module in PRODUCT.items()
        if name not in ("__init__", "bemore_voice")
    }
    assert imported == ARROWS
    TopologicalSorter(ARROWS).prepare()  # raises CycleError


def test_only_the_postgres_modules_import_asyncpg() -> None:
    """So that a start on SQLite does not load it."""
    importing = {name for name, module in PRODUCT.items() if "asyncpg" in imports_of(module)}
    assert importing
    assert all(name.startswith("postgres") for name in importing)


@pytest.mark.parametrize("module", ["conversation", "outbox"])
def test_rules_load_neither_asyncio_nor_aiohttp(module: str) -> None:
    code = f"import sys, bemore.{module}; print(*{{'asyncio', 'aiohttp', 'logging', 'socket'}} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def own_names(module: ast.AST) -> Iterator[str]:
    """Yield the names that a module defines itself: of functions and classes, and of attributes that it sets."""
    for node in ast.walk(module):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def private_names(module: ast.AST) -> Iterator[str]:
    for node in ast.walk(module):
        match node:
            case ast.Attribute(attr=name) if name.startswith("_") and not name.startswith("__"):
                yield name
            case ast.ImportFrom(names=aliases):
                yield from (alias.name for alias in aliases if alias.name.startswith("_"))


def test_private_names_of_libraries_are_those_of_the_table() -> None:
    own = {name for module in PRODUCT.values() for name in own_names(module)} | DOCUMENTED
    used = {(name, file) for file, module in PRODUCT.items() for name in private_names(module) if name not in own}
    assert used == {(name, file) for name, (file, _) in PRIVATE.items()}
    assert len(PRIVATE) <= 3
    assert len({file for file, _ in PRIVATE.values()}) <= 1


@pytest.mark.parametrize("name", PRIVATE)
def test_library_still_has_the_private_name(name: str) -> None:
    assert hasattr(PRIVATE[name][1], name)
