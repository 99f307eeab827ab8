"""Soak the server under attack: fifty people talk, one client does its worst, and the table says what they felt.

    .venv/bin/python bench/attack.py [--seconds 10] [--database sqlite,postgres] [--only "pings;pleas for help"]

The server runs as a program with its default limits, asks a local stand-in for Gemini, and goes through all attacks of
attacker.py, one after the other. Before each the fifty talk undisturbed for as long. Exit status 1 where one of them
was left without an answer. bench/README.md says how to read the table. Needs requirements-dev.txt and Linux.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from attacker import ATTACKS, ON_POSTGRES
from processes import (
    HERE,
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

MODEL = "20-300-50"  # 20 chunks, the first after 300 ms, then one every 50
MOST_SECONDS = 25  # an attack may take: longer, and the fifty would reach their own rate
SAMPLE_SECONDS = 0.1
REST_SECONDS = 1  # after an attack, before the memory is read
HEAD = (
    "attack",
    "sent",
    "connections",
    "first word without: p50, p99 ms",
    "with",
    "pong without: p50, p99 ms",
    "with",
    "server's CPU",
    "MiB before, most, after",
    "log KiB",
    "database KiB",
    "backends",
    "asked, errors, unanswered",
)


@dataclass
class Subject:
    """The server under attack, and where it keeps what it is told."""

    served: Served
    model: str  # chunks-first_ms-gap_ms
    database_url: str  # empty for SQLite
    cluster: Cluster | None

    def database_kib(self) -> int:
        if self.cluster is None:
            return sum(path.stat().st_size for path in self.served.folder.glob("bemore.db*")) // 1024
        size = "SELECT pg_database_size(current_database())"
        return int(self.cluster.execute(size, self.database_url)) // 1024

    def log_kib(self) -> float:
        return self.served.log.stat().st_size / 1024


@dataclass
class Watch:
    """What the server took at most, looked at again and again."""

    subject: Subject
    kib: int = 0
    backends: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        self.kib = max(self.kib, resident_kib(self.subject.served.pid))
        if self.subject.cluster is not None:
            self.backends = max(self.backends, len(self.subject.cluster.backends()))

    def run(self) -> None:
        while not self.over.wait(SAMPLE_SECONDS):
            self.look()


@contextlib.contextmanager
def watching(subject: Subject) -> Iterator[Watch]:
    watch = Watch(subject)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


@contextlib.contextmanager
def attacking(subject: Subject, name: str) -> Iterator[dict[str, int]]:
    """Attack until the end of the block; what was sent is in the dict then."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(HERE / "attacker.py", subject.served.port, name, subject.database_url, **pipes) as process:
        assert read_line(process) == "ready"
        tell(process)
        sent: dict[str, int] = {}
        yield sent
        tell(process)
        sent |= json.loads(read_line(process))


def talk(subject: Subject, seconds: float, during: Callable[[], Any] = contextlib.nullcontext) -> dict[str, Any]:
    """Let the fifty talk for so long, and wait for their last reply; return what others.py has counted."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(HERE / "others.py", subject.served.port, time.time_ns(), seconds, subject.model, **pipes) as process:
        assert read_line(process) == "open"
        with during():
            tell(process)
            return dict(json.loads(read_line(process)))


def trial(subject: Subject, name: str, seconds: float) -> tuple[list[str], int]:
    """Let the fifty talk without and with an attack; return the table's row, and how many were not answered."""
    pid = subject.served.pid
    without = talk(subject, seconds)
    before = resident_kib(pid), subject.log_kib(), subject.database_kib()
    sent: dict[str, int] = {}

    @contextlib.contextmanager
    def disturbed() -> Iterator[None]:
        with attacking(subject, name) as counts:
            yield
        sent.update(counts)

    began, spent = time.monotonic(), cpu_us(pid)
    with watching(subject) as watch:
        under = talk(subject, seconds, disturbed)
    spent = (cpu_us(pid) - spent) / 1e6 / (time.monotonic() - began)
    time.sleep(min(REST_SECONDS, seconds))
    after = resident_kib(pid), subject.log_kib(), subject.database_kib()
    unanswered = under.get("unanswered", 0) + under.get("wrong", 0)
    locks = name in ON_POSTGRES  # its own connection is none of the server's
    return [
        name,
        f"{sent['sent']:,}",
        f"{sent['connections']:,}",
        *(p50_and_p99(times[what]) for what in ("first", "pong") for times in (without, under)),
        f"{spent:.0%}",
        ", ".join(f"{kib / 1024:.1f}" for kib in (before[0], watch.kib, after[0])),
        f"{after[1] - before[1]:.0f}",
        f"{after[2] - before[2]}",
        str(watch.backends - locks) if subject.cluster is not None else "",
        f"{under['asked']}, {under.get('errors', 0)}, {unanswered}",
    ], unanswered


def p50_and_p99(times: list[float]) -> str:
    return f"{percentile(times, 0.5):.1f}, {percentile(times, 0.99):.1f}" if times else "none"


def soak(title: str, subject: Subject, attacks: list[str], seconds: float) -> int:
    """Print a table with a row for each attack, as it comes; return how many requests were not answered."""
    print(f"\n{title}\n\n| {' | '.join(HEAD)} |\n|---|{'--:|' * (len(HEAD) - 1)}", flush=True)
    talk(subject, min(seconds, 2))  # so that nothing is done for the first time in what is measured
    unanswered = 0
    for name in attacks:
        row, missing = trial(subject, name, seconds)
        unanswered += missing
        print(f"| {' | '.join(row)} |", flush=True)
    return unanswered


def settings(gemini: int, model: str) -> dict[str, object]:
    """Return what the program is started with: its own defaults, but for who answers and who may connect."""
    url = f"http://127.0.0.1:{gemini}/{model}"
    return {"GEMINI_API_KEY": "bench", "GEMINI_BASE_URL": url, "AUTO_CREATE_SESSIONS": 1}


def on_sqlite(gemini: int, options: argparse.Namespace) -> int:
    attacks = [name for name in options.only.split(";") if name in ATTACKS]
    with serving([SERVER], **settings(gemini, options.model)) as served:
        return soak("SQLite", Subject(served, options.model, "", None), attacks, options.seconds)


def on_postgres(gemini: int, options: argparse.Namespace) -> int:
    attacks = options.only.split(";")
    with postgres() as cluster, cluster.database() as url:
        with serving([SERVER], **settings(gemini, options.model), DATABASE_URL=url) as served:
            return soak("Postgres", Subject(served, options.model, url, cluster), attacks, options.seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help=f"of each attack, {MOST_SECONDS} at most")
    parser.add_argument("--database", default="sqlite,postgres")
    parser.add_argument("--model", default=MODEL, help="its replies, as chunks-first_ms-gap_ms")
    parser.add_argument("--only", default=";".join([*ATTACKS, *ON_POSTGRES]), help="names, with ; between them")
    options = parser.parse_args()
    if unknown := set(options.only.split(";")) - {*ATTACKS, *ON_POSTGRES}:
        parser.error(f"--only: takes {'; '.join([*ATTACKS, *ON_POSTGRES])}, got {'; '.join(sorted(unknown))}")
    if not 0 < options.seconds <= MOST_SECONDS:
        parser.error(f"--seconds: takes up to {MOST_SECONDS}, got {options.seconds}")
    prepare()
    unanswered = 0
    with stand_in() as gemini:
        for database in options.database.split(","):
            unanswered += {"sqlite": on_sqlite, "postgres": on_postgres}[database](gemini, options)
    return int(unanswered > 0)


if __name__ == "__main__":
    sys.exit(main())
