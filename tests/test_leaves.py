"""Arrows run one way: a leaf loads neither the server nor a leaf that it does not stand on."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each leaf may load, besides itself.
MAY_LOAD: dict[str, set[str]] = {
    "access": set(),
    "api": {"access", "counsellor", "connections", "log", "refusals", "settings", "storage"},
    "care": set(),
    "connections": set(),
    "counsellor": set(),
    "log": set(),
    "refusals": {"access", "counsellor", "connections", "log", "settings", "storage"},
    "settings": set(),
    "demo": {"counsellor"},
    "gemini": {"counsellor"},
    "storage": {"counsellor"},
    "retention": {"counsellor", "storage"},
    "tables": set(),
    "sqlite": {"counsellor", "storage", "tables"},
    "database_url": {"counsellor", "storage"},
    "postgres_start": {"counsellor", "storage", "tables"},
    "postgres": {"counsellor", "database_url", "postgres_start", "storage", "tables"},
}
LOAD = """
import sys
import bemore.{leaf}
print(*(name for name in sys.modules if name.partition(".")[0] in ("bemore", "bemore_voice", "asyncpg")))
"""


def test_every_leaf_is_listed() -> None:
    assert {path.stem for path in (ROOT / "bemore").glob("*.py")} - {"__init__"} == set(MAY_LOAD)


@pytest.mark.parametrize("leaf", MAY_LOAD)
def test_a_leaf_loads_what_it_stands_on_and_no_more(leaf: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LOAD.format(leaf=leaf)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ran.stdout.split())
    leaves = {name.removeprefix("bemore.") for name in loaded if name.startswith("bemore.")}
    assert leaves == {leaf} | (leaves & MAY_LOAD[leaf])
    assert "bemore_voice" not in loaded
    assert ("asyncpg" in loaded) is leaf.startswith("postgres")
