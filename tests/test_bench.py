"""The programs of bench/ run, and what they read is right; no figure is looked at."""

import asyncio
import re
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"
NUMBER = re.compile(r"[-+]?[\d,.]+(e[+-]\d+)?")


async def run(program: str, *arguments: object) -> tuple[str, str]:
    """Run one to its end; return what it printed on stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        BENCH / program,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()  # it stops what it has started
            await process.wait()
    assert process.returncode == 0, out.decode() + err.decode()
    return out.decode(), err.decode()


def tables(printed: str) -> list[list[list[str]]]:
    """Return the cells of each printed table, its head first, without the line below the head."""
    found = re.findall(r"(?:^\|.*\n?)+", printed, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in each.splitlines()] for each in found]
    return [[head, *body] for head, _, *body in rows]


async def test_run_measures_every_contender_under_every_load() -> None:
    printed, said = await run("run.py", "--quick")
    ((head, *rows),) = tables(printed)
    assert head[2:5] == ["this server, SQLite", "this server, Postgres", "no server: aiohttp alone reads the model"]
    for peer in ("FastAPI", "Node"):
        assert any(name.startswith(peer) for name in head) or f"left out: {peer}" in said
    assert {row[0] for row in rows} == {"flat", "talking", "moment", "idle"}
    for load, _, *cells in rows:
        assert all(NUMBER.fullmatch(cell) for cell in cells if cell or load != "idle"), load


async def test_run_compares_two_checkouts_on_both_databases() -> None:
    printed, _ = await run("run.py", "--quick", "--only", "moment", "--than", BENCH.parent)
    measured, *compared = tables(printed)
    assert len(measured[0]) == 2 + 4
    assert len(compared) == 2
    for _, *rows in compared:
        assert all(NUMBER.fullmatch(cell) for row in rows for cell in row[2:])


async def test_attack_tells_what_the_others_feel() -> None:
    attacks, short = "risk signals;a model that never ends", ("--seconds", "0.3", "--model", "5-30-10")
    printed, _ = await run("attack.py", "--database", "sqlite", "--only", attacks, *short)
    ((_, *rows),) = tables(printed)
    assert [row[0] for row in rows] == attacks.split(";")
    assert all(re.fullmatch(r"\d+, 0, 0", row[-1]) for row in rows)


async def test_soak_loses_nothing_among_faults() -> None:
    printed, _ = await run("soak.py", "--replies", 60, "--sessions", 10, "--faults", 0.5)
    for line in ("lost: 0", "stored twice: 0", "faults that did not happen: 0"):
        assert line in printed


async def test_start_prints_cpu_and_memory() -> None:
    printed, _ = await run("start.py", "--rounds", 1)
    assert re.search(r"[\d.]+ s of CPU .*\n.* \d+ MiB resident", printed)
