"""The programs of bench/ run, and what they read is right: no figure is looked at."""

import asyncio
import re
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"
NUMBER = re.compile(r"-?[\d,.]+(e[+-]\d+)?")


async def run(program: str, *arguments: str) -> tuple[str, str]:
    """Run one to its end; return what it printed on stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, BENCH / program, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()  # it stops what it has started
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out.decode(), err.decode()


def table(printed: str) -> dict[str, list[str]]:
    """Return the cells of a printed table, by what its rows are called."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return {row[0].strip("*"): row[1:] for row in rows[2:]}


async def test_the_loads_run_and_every_reply_is_right() -> None:
    printed, said = await run("run.py", "--quick", "--only", "flat,talking,moment,idle")
    rows = table(printed)
    for name in ("this server, SQLite", "this server, Postgres"):
        assert all(NUMBER.fullmatch(cell) for cell in rows.pop(name))
    floor = rows.pop("no server: aiohttp alone reads the model")
    assert all(NUMBER.fullmatch(cell) for cell in floor[:-1])
    for peer in ("FastAPI", "Node"):
        measured = [cells for name, cells in rows.items() if name.startswith(peer)]
        assert f"left out: {peer}" in said or all(NUMBER.fullmatch(cell) for cell in measured[0])


async def test_an_attack_is_told_by_what_the_others_feel() -> None:
    attacks, short = "pleas for help;a model that never ends", ("--seconds", "0.3", "--model", "5-30-10")
    printed, _ = await run("attack.py", "--database", "sqlite", "--only", attacks, *short)
    rows = table(printed)
    assert list(rows) == attacks.split(";")
    for cells in rows.values():
        assert int(cells[0].replace(",", "")) > 0
        assert re.fullmatch(r"\d+, 0, 0", cells[-1])
