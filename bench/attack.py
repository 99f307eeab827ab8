"""Attack the server in several ways: fifty people talk, one client does its worst, and the table says what they felt.

    .venv/bin/python bench/attack.py [--seconds 10] [--database sqlite,postgres] [--only "pings;risk signals"]

The server runs as a program with its default limits, asks a local stand-in for Gemini, and goes through all attacks of
attacker.py, one after the other. Before each the fifty talk undisturbed for as long. Exit status 1 where one of their
requests was left without an answer, or the attacker has sent nothing. bench/README.md says how to read the table.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from attacker import ATTACKS
from processes import (
    HERE,
    SERVER,
    Served,
    cpu_us,
    forget_peak,
    peak_kib,
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

MODEL = "20-300-50"  # 20 chunks, the first after 300 ms, then one every 50
MOST_SECONDS = 25  # an attack may take: longer, and the fifty would reach their own rate
HEAD = (
    "attack",
    "frames sent, connections",
    "first word without: p50, p99 ms",
    "with",
    "pong without: p50, p99 ms",
    "with",
    "server's CPU",
    "MiB before, most",
    "log KiB",
    "asked, errors, unanswered",
)
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


@contextlib.contextmanager
def attacking(served: Served, name: str) -> Iterator[dict[str, int]]:
    """Attack until the end of the block; what was sent is in the dict then."""
    with running(HERE / "attacker.py", served.port, name, **PIPES) as process:
        assert read_line(process) == "ready"
        tell(process)
        sent: dict[str, int] = {}
        yield sent
        tell(process)
        sent |= json.loads(read_line(process))


def talk(served: Served, model: str, seconds: float, attack: str = "") -> tuple[dict[str, Any], dict[str, int]]:
    """Let the fifty talk for so long, and wait for their last reply; return what they counted, and what was sent."""
    with running(HERE / "others.py", served.port, time.time_ns(), seconds, model, **PIPES) as process:
        assert read_line(process) == "open"
        attacked = attacking(served, attack) if attack else contextlib.nullcontext(dict[str, int]())
        with attacked as sent:
            tell(process)
            counts = json.loads(read_line(process))
    return counts, sent


def trial(served: Served, model: str, name: str, seconds: float) -> tuple[list[str], bool]:
    """Let the fifty talk without and with an attack; return the table's row, and whether all went well."""
    without, _ = talk(served, model, seconds)
    before, log = resident_kib(served.pid), served.log.stat().st_size
    forget_peak(served.pid)
    began, spent = time.monotonic(), cpu_us(served.pid)
    under, sent = talk(served, model, seconds, name)
    share = (cpu_us(served.pid) - spent) / 1e6 / (time.monotonic() - began)
    unanswered = under.get("unanswered", 0) + under.get("wrong", 0)
    row = [
        name,
        f"{sent['sent']:,}, {sent['connections']:,}",
        *(p50_and_p99(times[what]) for what in ("first", "pong") for times in (without, under)),
        f"{share:.0%}",
        f"{before / 1024:.1f}, {peak_kib(served.pid) / 1024:.1f}",
        f"{(served.log.stat().st_size - log) / 1024:.0f}",
        f"{under['asked']}, {under.get('errors', 0)}, {unanswered}",
    ]
    return row, sent["sent"] > 0 and not unanswered


def p50_and_p99(times: list[float]) -> str:
    return f"{percentile(times, 0.5):.1f}, {percentile(times, 0.99):.1f}" if times else "none"


def attack_all(title: str, gemini: int, options: argparse.Namespace, **database: object) -> bool:
    """Print a table with a row for each attack, as it comes; return whether all went well."""
    url = f"http://127.0.0.1:{gemini}/{options.model}"
    settings = {"GEMINI_API_KEY": "bench", "GEMINI_BASE_URL": url, "AUTO_CREATE_SESSIONS": 1, **database}
    print(f"\n{title}\n\n| {' | '.join(HEAD)} |\n|---|{'--:|' * (len(HEAD) - 1)}", flush=True)
    well = True
    with serving([SERVER], **settings) as served:
        talk(served, options.model, min(options.seconds, 2))  # so that nothing that is measured is done first
        for name in options.only.split(";"):
            row, went_well = trial(served, options.model, name, options.seconds)
            well &= went_well
            print(f"| {' | '.join(row)} |", flush=True)
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help=f"of each attack, {MOST_SECONDS} at most")
    parser.add_argument("--database", default="sqlite,postgres")
    parser.add_argument("--model", default=MODEL, help="its replies, as chunks-first_ms-gap_ms")
    parser.add_argument("--only", default=";".join(ATTACKS), help="names, with ; between them")
    options = parser.parse_args()
    if unknown := set(options.only.split(";")) - set(ATTACKS):
        parser.error(f"--only: takes {'; '.join(ATTACKS)}, got {'; '.join(sorted(unknown))}")
    if not 0 < options.seconds <= MOST_SECONDS:
        parser.error(f"--seconds: takes up to {MOST_SECONDS}, got {options.seconds}")
    prepare()
    well = True
    with stand_in() as gemini:
        if "sqlite" in options.database:
            well &= attack_all("SQLite", gemini, options)
        if "postgres" in options.database:
            with postgres() as cluster, cluster.database() as url:
                well &= attack_all("Postgres", gemini, options, DATABASE_URL=url)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
