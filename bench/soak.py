"""Soak the server in faults, and count what was lost.

    .venv/bin/python bench/soak.py [--replies 5000] [--sessions 50] [--faults 0.05] [--seed 0]

The server runs in a process of its own on a real Postgres, asks a local stand-in for Gemini, and is talked to by
frontends. A share of the replies meets a fault: one of tests/model_faults.py, a connection that is closed, cut or
frozen, a cancel, or a database that is gone for three seconds, which all sessions meet together. Exit status 1 when a
reply was lost, stored twice or stored otherwise than shown, when a fault did not happen, or when memory grew by more
than 10 %. Needs requirements-dev.txt and Linux.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import logging
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import processes  # noqa: F401 - makes the tests' modules importable
from aiohttp import web
from model_faults import MODEL_FAULTS, Fault
from processes import SERVER, Cluster, Served, postgres, prepare, resident_kib, serving
from standin import GeminiStandIn, event, stream
from support import ENDS, Frame, Frontend, Wire, text_of, wire_to_postgres

FAULTS = [
    *MODEL_FAULTS,
    "closed",
    "cut",
    "frozen",
    "cancelled",
    "database gone",
]
WARM_UP = 0.4  # of the replies, before the first look at the memory: pools and buffers grow to what the faults need
PATIENCE = 60  # seconds after which a reply counts as lost
OUTAGE_SECONDS = 3
BETWEEN_OUTAGES = 5  # seconds; two at once would be a longer one
PART = "{message} {number} "


@dataclass
class Soak:
    """What all sessions share, and what is counted."""

    options: argparse.Namespace
    served: Served
    database: Wire
    table: asyncpg.Pool
    http: aiohttp.ClientSession
    random: random.Random
    left: int  # replies to ask for
    plans: dict[str, collections.deque[Any]] = field(default_factory=dict)
    outage: asyncio.Task[None] | None = None
    healed: float = 0
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    met: collections.Counter[str] = field(default_factory=collections.Counter)
    missed: list[str] = field(default_factory=list)  # faults that did not happen
    lost: list[str] = field(default_factory=list)
    shown: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)  # messages that ended in an error: their rows may exist
    slowest: tuple[float, str] = (0.0, "none")
    sizes: list[int] = field(default_factory=list)  # KiB of the server: when warm, in the middle, at the end

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer for Gemini: as the fault of this message says, or in ten chunks that carry the message."""
        said = [part["text"] for content in (await request.json())["contents"] for part in content["parts"]]
        message = next(text for text in reversed(said) if text in self.plans)
        if plan := self.plans[message]:
            return await self.scripted(plan, request)
        blocks = [event(PART.format(message=message, number=number)) for number in range(10)]
        return await stream(*blocks, event(finish="STOP"))(request)

    async def scripted(self, plan: collections.deque[Any], request: web.Request) -> web.StreamResponse:
        response: web.StreamResponse = await plan.popleft()(request)
        return response

    def take(self) -> bool:
        """Take one of the replies that are left; return whether there was one."""
        if self.left in (self.options.replies, self.options.replies // 2):
            self.sizes.append(resident_kib(self.served.pid))
        self.left -= 1
        return self.left >= 0

    def draw(self) -> str:
        """Draw the fault that the next reply meets, mostly none."""
        fault = self.random.choice(FAULTS) if self.random.random() < self.options.faults else ""
        if fault == "database gone":
            if self.away(time.monotonic() - BETWEEN_OUTAGES):
                return ""
            self.outage = asyncio.create_task(self.break_database())
        self.met[fault] += bool(fault)
        return fault

    async def break_database(self) -> None:
        before = self.database.refused
        self.database.down = True
        cut = self.database.cut()
        await asyncio.sleep(OUTAGE_SECONDS)
        self.database.down = False
        self.healed = time.monotonic()
        if not cut and self.database.refused == before:
            self.missed.append("database gone")

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
        self.since = 0  # when the last request was sent, in the unit of seq: microseconds since the epoch
        self.failed_at: tuple[float, str] | None = None
        self.page = self.new_page()

    def new_page(self) -> Frontend:
        url = f"http://127.0.0.1:{self.wire.port}/ws/session/{self.id}"
        return Frontend(self.soak.http, url, timeout=aiohttp.ClientWSTimeout(ws_close=1))

    async def run(self) -> None:
        await self.page.open()
        for number in itertools.count():
            if not self.soak.take():
                break
            message, fault, asked = f"<{self.id}/{number}>", self.soak.draw(), time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    end = await self.ask(message, fault, asked)
            except TimeoutError:
                end = "no end"
                self.soak.lost.append(f"{message} {fault}: no end")
            self.soak.ends[end] += 1
            self.note_recovery(fault, end, asked)
        await self.page.close()

    async def ask(self, message: str, fault: str, asked: float) -> str:
        """Ask, meet the fault, and judge what comes of it; return how the reply ended."""
        expected = MODEL_FAULTS.get(fault, Fault([], "네, 듣고 있어요."))
        whole = "".join(PART.format(message=message, number=number) for number in range(10))
        text = expected.text.replace("네, 듣고 있어요.", whole)
        self.soak.plans[message] = collections.deque(expected.answers)
        self.since = time.time_ns() // 1000
        await self.page.ask(message)
        await asyncio.sleep(self.soak.random.uniform(0, 0.05))
        if fault == "closed":
            return await self.reload(message, text, asked)
        if fault == "cancelled":
            await self.page.cancel()
        elif fault in ("cut", "frozen"):
            await self.come_back(frozen=fault == "frozen")
        frames = await self.reply()
        end = frames[-1]["type"].removeprefix("ai_stream_")
        if self.soak.plans[message] and not self.soak.away(asked):
            self.soak.missed.append(f"{message} {fault}")
        return await self.judge(message, fault, (text, expected.end), (text_of(frames), end), asked)

    async def come_back(self, *, frozen: bool) -> None:
        """Lose the connection, with or without the server's knowledge, and connect again."""
        if frozen:
            self.wire.strand()
        await self.page.cut()
        await asyncio.sleep(self.soak.random.uniform(0, 0.2))
        await self.page.open()

    def came(self) -> list[Frame]:
        """Return the frames since the request: a page that is loaded anew may be sent older ones again."""
        return [frame for frame in self.page.frames if frame.get("seq", self.since) >= self.since]

    async def reply(self) -> list[Frame]:
        """Read to the end of the reply."""
        while not any(frame["type"] in ENDS for frame in self.came()):
            await self.page.frame()
        return self.came()

    async def judge(
        self, message: str, fault: str, expected: tuple[str, str], got: tuple[str, str], asked: float
    ) -> str:
        text, end = got
        if end == "complete" and text:
            self.shown.append((message, text))
        elif end == "error":
            self.soak.failed.add(message)
        if end == "error" and self.soak.away(asked):
            await asyncio.sleep(0.5)  # a person's patience, or all replies would be spent in the outage
            return "error while the database was away"
        # What was held back for the gap between two chunks goes with a reply that is cancelled or fails.
        ends_early = end == "complete" if fault == "cancelled" else end == expected[1] == "error"
        if got != expected and not (ends_early and expected[0].startswith(text)):
            self.soak.lost.append(f"{message} {fault}: {end} with {len(text)} of {len(expected[0])} characters")
        return end

    async def reload(self, message: str, text: str, asked: float) -> str:
        """Close the page in the middle of its reply and load it anew; the reply must be stored, seen or not."""
        await self.page.close()
        query = "SELECT 1 FROM conversations WHERE user_message = $1"
        stored = False
        while not (stored or self.soak.away(asked)):
            stored = bool(await self.soak.table.fetch(query, message))
        self.page = self.new_page()
        await self.page.open()
        await self.page.settle()  # what was kept for it has begun to come with the pong
        if self.came():
            frames = await self.reply()
            stored = stored or frames[-1]["type"] == "ai_stream_complete"
        if not stored:
            self.soak.failed.add(message)
            return "error while the database was away"
        self.shown.append((message, text))
        return "complete"

    def note_recovery(self, fault: str, end: str, asked: float) -> None:
        """Measure the time from asking into a fault to the next whole reply."""
        if fault and self.failed_at is None:
            self.failed_at = asked, fault
        elif self.failed_at is not None and end == "complete" and not fault:
            since, first_fault = self.failed_at
            self.soak.slowest = max(self.soak.slowest, (time.monotonic() - since, first_fault))
            self.failed_at = None


async def converse(soak: Soak, session_id: str) -> None:
    async with Wire(lambda: asyncio.open_connection("127.0.0.1", soak.served.port)) as wire:
        await Conversation(soak, session_id, wire).run()


async def run(options: argparse.Namespace, cluster: Cluster, url: str) -> int:
    async with contextlib.AsyncExitStack() as stack:
        gemini = await stack.enter_async_context(GeminiStandIn())
        database = await stack.enter_async_context(wire_to_postgres(url))
        settings = {
            "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{database.port}{urlsplit(url).path}",
            "GEMINI_API_KEY": "soak",
            "GEMINI_BASE_URL": gemini.url,
            "AUTO_CREATE_SESSIONS": 1,
            "MAX_AI_REQUESTS_PER_MINUTE": 6000,
            "STREAM_CHUNK_INTERVAL_MS": 5,
            "FIRST_CHUNK_TIMEOUT_SECONDS": 3,
            "CHUNK_TIMEOUT_SECONDS": 1,
        }
        server = contextlib.ExitStack()
        stack.callback(server.close)
        # In a thread: while the server starts, its database is reached through this loop.
        served = await asyncio.to_thread(server.enter_context, serving([SERVER], **settings))
        connector = aiohttp.TCPConnector(limit=0)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        table = await stack.enter_async_context(asyncpg.create_pool(url, min_size=1, max_size=4))
        left = int(options.replies * (1 + WARM_UP))
        soak = Soak(options, served, database, table, http, random.Random(options.seed), left)
        gemini.default = soak.answer
        began = time.monotonic()
        await asyncio.gather(*(converse(soak, f"s{number}") for number in range(options.sessions)))
        soak.sizes.append(resident_kib(served.pid))
        if soak.outage is not None:
            await soak.outage
        rows = await table.fetch("SELECT session_id, user_message, ai_response FROM conversations ORDER BY id")
        return report(soak, [tuple(row) for row in rows], time.monotonic() - began)


def report(soak: Soak, rows: list[tuple[str, str, str]], seconds: float) -> int:
    stored: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for session_id, message, reply in rows:
        if message not in soak.failed:
            stored[session_id].append((message, reply))
    times = collections.Counter(message for _, message, _ in rows)
    twice = [message for message, count in times.items() if count > 1]
    for session_id, shown in soak.shown.items():
        if stored[session_id] != shown:
            only_stored = sorted(message for message, _ in set(stored[session_id]) - set(shown))
            only_shown = sorted(message for message, _ in set(shown) - set(stored[session_id]))
            soak.lost.append(f"{session_id}: stored and not shown {only_stored}, shown and not stored {only_shown}")
    growth = max(soak.sizes[1:]) / soak.sizes[0] - 1
    print(f"replies: {soak.ends.total()} in {seconds:.0f} s, {dict(soak.ends)}; faults: {soak.met.total()}")
    print("  " + ", ".join(f"{name} {count}" for name, count in sorted(soak.met.items()) if name))
    print(f"lost: {len(soak.lost)} (must be 0)")
    print(f"stored twice: {len(twice)} (must be 0)")
    print(f"faults that did not happen: {len(soak.missed)} (must be 0)")
    mib = ", ".join(f"{size / 1024:.1f}" for size in soak.sizes)
    print(f"memory when warm, in the middle and at the end: {mib} MiB, growth {growth:.1%} (at most 10 %)")
    slowest, fault = soak.slowest
    print(f"slowest recovery, from asking into a fault to the next whole reply: {slowest:.1f} s ({fault})")
    for line in [*soak.lost[:20], *soak.missed[:20]]:
        print(f"  {line}")
    return int(bool(soak.lost or twice or soak.missed or growth > 0.1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replies", type=int, default=5000)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--faults", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # the stand-in's, whose clients leave as they should
    prepare()
    with postgres() as cluster, cluster.database() as url:
        return asyncio.run(run(options, cluster, url))


if __name__ == "__main__":
    sys.exit(main())
