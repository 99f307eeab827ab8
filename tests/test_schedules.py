"""Random schedules of everything that can happen to a session, and what must hold after each.

SCHEDULES is how many (50), SEED the first one's number. A failure names its seed: SCHEDULES=1 SEED=n runs it alone.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from standin import GeminiStandIn, event, status
from support import ENDS, FaultyStorage, Server, kinds_of, make_settings, masked, serve, text_of
from tools import PATIENCE, until

from bemore.care import FIRST, SHORT, signal_in
from bemore.log import anonymous
from bemore_voice import Failure, Session, Socket, Utterance, make_counsellor, make_storage

SCHEDULES = int(os.environ.get("SCHEDULES", "50"))
SEED = int(os.environ.get("SEED", "0"))
TOGETHER = 25  # schedules under way at once, each in a session of its own

ACTIONS = ["ask", "ask", "ask", "ask", "plea", "bad", "cancel", "together", "flood", "cut", "cut", "close", "return",
           "return", "break", "heal", "lock", "clock", "release", "wait", "wait"]  # fmt: skip
PLANS = ["whole", "whole", "gated", "gated", "slow", "again", "forbidden", "reset", "cut off", "malformed", "blocked",
         "empty", "stalled"]  # fmt: skip
REFUSALS = ("empty_message", "rate_limited")  # told to the asker alone
PREPARED = (*FIRST.values(), *SHORT.values())
CANCEL = ("cancel_ai_response", None)


class Page:
    """A browser's page: it reads all the time, and keeps what it has not seen."""

    def __init__(self, server: Server, session_id: str) -> None:
        self.frames: list[dict[str, Any]] = []
        self.pongs = 0
        self.ws: aiohttp.ClientWebSocketResponse | None = None
        self._url = f"{server.url}/ws/session/{session_id}"
        self._http = server.http
        self._seen: set[int] = set()
        self._news = asyncio.Condition()
        self._reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self.ws = await self._http.ws_connect(self._url, timeout=aiohttp.ClientWSTimeout(ws_close=1))
        self._reader = asyncio.create_task(self._read(self.ws))

    async def _read(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        async for message in ws:
            if message.type is not aiohttp.WSMsgType.TEXT:
                break
            frame = json.loads(message.data)
            async with self._news:
                if frame["type"] == "pong":
                    self.pongs += 1
                elif "seq" not in frame or frame["seq"] not in self._seen:
                    self.frames.append(frame)
                    self._seen.add(frame.get("seq", 0))
                self._news.notify_all()
        async with self._news:
            self.ws = None
            self._news.notify_all()

    async def send(self, *frames: tuple[str, object]) -> None:
        """Send frames in one packet, and wait until the server has acted on them, or has closed the socket."""
        if self.ws is None:
            return
        pongs = self.pongs + 1
        with contextlib.suppress(ConnectionError):  # it has just been closed
            packet = b"".join(masked(json.dumps({"type": k, "data": d}).encode()) for k, d in (*frames, ("ping", None)))
            os.write(self.ws.get_extra_info("socket").fileno(), packet)
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: self.pongs >= pongs or self.ws is None)

    async def reply(self, before: int, patience: float = PATIENCE) -> list[dict[str, Any]]:
        """Wait for the reply after so many, and return its frames."""

        def ended() -> bool:
            replies = replies_of(self.frames)
            return len(replies) > before and replies[before][-1]["type"] in ENDS

        async with asyncio.timeout(patience), self._news:
            await self._news.wait_for(ended)
        return replies_of(self.frames)[before]

    async def leave(self, *, cut: bool) -> None:
        if self._reader is None:
            return
        if self.ws is not None:
            if cut:
                self.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            await self.ws.close()
        await self._reader


def replies_of(frames: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the frames of a page by the reply that they belong to, refusals left out."""
    replies: list[list[dict[str, Any]]] = [[]]
    for frame in sorted((frame for frame in frames if "seq" in frame), key=lambda frame: frame["seq"]):
        replies[-1].append(frame)
        if frame["type"] in ENDS:
            replies.append([])
    return [reply for reply in replies if reply]


class Counts:
    """What the server has read and withdrawn, by session: a test on the wire cannot know when a cancel was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: Counter[str] = Counter()
        self.pleas: Counter[str] = Counter()
        self.withdrawn: Counter[str] = Counter()
        submit, cancel = Session.submit, Session.cancel

        def counted_submit(session: Session, asker: Socket, asked: Utterance | Failure) -> bool:
            self.read[session.id] += 1
            self.pleas[session.id] += isinstance(asked, Utterance) and signal_in(asked.message) is not None
            before = len(session._waiting) + 1
            taken = submit(session, asker, asked)
            if not taken:
                self.withdrawn[session.id] += before - len(session._waiting)
            return taken

        def counted_cancel(session: Session) -> None:
            before = len(session._waiting)
            cancel(session)
            self.withdrawn[session.id] += before - len(session._waiting)

        monkeypatch.setattr(Session, "submit", counted_submit)
        monkeypatch.setattr(Session, "cancel", counted_cancel)


class House:
    """What the sessions of a schedule share: a server, and what happens to all of it."""

    def __init__(self, server: Server, storage: FaultyStorage, counts: Counts, path: Path) -> None:
        self.server, self.storage, self.counts = server, storage, counts
        self.plans: dict[str, str] = {}
        self._path = path
        self._lock: sqlite3.Connection | None = None

    def lock(self, seconds: float) -> None:
        """Hold the database's lock for so long, as another program does."""
        if self._lock is not None:
            return
        other = sqlite3.connect(self._path, isolation_level=None, timeout=0)
        try:
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:  # the server holds it
            other.close()
        else:
            self._lock = other
            asyncio.get_running_loop().call_later(seconds, self.unlock)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rows(self, session_id: str) -> list[tuple[str, str]]:
        """What is stored: message and reply of each turn."""
        with contextlib.closing(sqlite3.connect(self._path)) as other:
            return other.execute(
                "SELECT user_message, ai_response FROM conversations WHERE session_id = ? ORDER BY id", (session_id,)
            ).fetchall()


class Schedule:
    """One session's random life."""

    def __init__(self, seed: int, house: House) -> None:
        self.random = random.Random(seed)
        self.id = f"schedule-{seed}"
        self.house = house
        self.steady, self.flapping = Page(house.server, self.id), Page(house.server, self.id)
        self.asked = 0
        self.stopped = False  # the server was, and the flapping page may not have come back before
        self.script: list[str] = []

    def question(self, opening: str = "") -> tuple[str, object]:
        message = f"{opening}<{self.id}/{self.asked}>"
        plan = self.random.choice(PLANS)
        self.script[-1] += f" {plan}"
        self.house.plans[message] = plan
        self.asked += 1
        return "request_ai_response", {"message": message, "emotion": "sad"}

    async def act(self, action: str) -> None:
        page = self.random.choice([self.steady, self.flapping])
        page = page if page.ws is not None else self.steady
        match action:
            case "ask":
                await page.send(self.question())
            case "plea":
                await page.send(self.question("죽고 싶어요 "))
            case "bad":
                await page.send(("request_ai_response", {"message": " "}))
            case "cancel":
                await page.send(CANCEL)
            case "together":
                await page.send(self.question(), CANCEL)
            case "flood":
                await self.flood()
            case "cut":
                await self.flapping.leave(cut=True)
            case "close":
                if self.flapping.ws is not None:
                    await self.flapping.leave(cut=False)
                    self.flapping = Page(self.house.server, self.id)  # a page loaded anew knows nothing
            case "return":
                if self.flapping.ws is None:
                    await self.flapping.open()
            case "break":
                self.house.storage.broken.add(self.id)
            case "heal":
                self.house.storage.broken.discard(self.id)
            case "lock":
                self.house.lock(self.random.uniform(0, 0.4))
            case "clock":
                CLOCK.step(self.random.choice([-600, -1, 1, 600]))
            case "release":
                GATES[self.id].set()
            case "wait":
                await asyncio.sleep(self.random.uniform(0, 0.03))

    async def flood(self) -> None:
        """Send more in one packet than a socket may, some of it with a cancel right behind."""
        page = Page(self.house.server, self.id)
        await page.open()
        frames = [frame for _ in range(35) for frame in (self.question(), CANCEL)]
        await page.send(*(frames if self.random.random() < 0.7 else frames[::2]))
        await page.leave(cut=False)

    async def live(self) -> None:
        GATES[self.id].clear()
        await self.steady.open()
        await self.flapping.open()
        for _ in range(self.random.randint(3, 14)):
            self.script.append(self.random.choice(ACTIONS))
            await self.act(self.script[-1])

    async def come_to_rest(self) -> None:
        for action in ("release", "heal", "return"):
            await self.act(action)
        session = self.house.server.session(self.id)
        await until(lambda: session.task is None and not any(socket._held for socket in session.sockets))
        for page in (self.steady, self.flapping):
            await page.send()
            await page.leave(cut=False)

    def check(self, outcomes: list[str], refusals: Collection[str] = REFUSALS) -> None:
        """Check what the steady page, the flapping page, the table and the log say of the same session."""
        frames = [frame for frame in self.steady.frames if "seq" in frame]
        seqs = [frame["seq"] for frame in frames]
        assert seqs == sorted(set(seqs))
        replies = replies_of(frames)
        seen = []
        for reply in replies:
            kinds = kinds_of(reply)
            assert kinds in (["complete"], ["error"]) or kinds[:2] == ["begin", "chunk"], kinds
            assert kinds[1:-1] == ["chunk"] * (len(kinds) - 2), kinds
            assert len(set(re.findall(r"<(.*?)>", text_of(reply)))) <= 1, "a frame of one reply inside another"
            end = reply[-1]
            seen.append("interrupted" if end.get("interrupted") else end.get("code", "complete"))
        # Every request that was read, also one with a cancel behind it, has ended once, in the order of the log.
        rest = iter(outcomes)
        assert all(end in rest for end in seen)
        assert set(Counter(outcomes) - Counter(seen)) <= set(refusals)
        assert len(outcomes) == self.house.counts.read[self.id] - self.house.counts.withdrawn[self.id]
        # Every plea was answered, whatever else was the matter.
        answers = [text_of(reply) for reply in replies if reply[-1]["type"] == "ai_stream_complete" and text_of(reply)]
        pleas = [text for text in answers if text.startswith(PREPARED)]
        assert len(pleas) >= self.house.counts.pleas[self.id]
        # What is stored is what was shown; of pleas, what the rate and the database allowed.
        rows = self.house.rows(self.id)
        stored = [row[1] for row in rows if not row[1].startswith(PREPARED)]
        assert stored == [text for text in answers if not text.startswith(PREPARED)]
        left = iter(pleas)
        assert all(row[1] in left for row in rows if row[1].startswith(PREPARED))
        assert all(row[0] in row[1] or "109" in row[1] for row in rows)
        # A page that has any frame of a reply has all of it, however often it was cut; no plea past the rate is kept.
        had = [frame for frame in self.flapping.frames if "seq" in frame]
        assert all(frame in frames for frame in had)
        for reply in replies:
            part = [frame for frame in reply if frame in had]
            assert part in ([], reply) or text_of(reply).startswith(PREPARED) or self.stopped


class Clock:
    """The server's, which somebody sets."""

    offset = 0.0

    def step(self, seconds: float) -> None:
        self.offset += seconds

    def __call__(self) -> float:
        return time.time() + self.offset


CLOCK = Clock()
GATES: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
ASKED = re.compile(r"<(schedule-\d+)/\d+>")


async def answer(request: web.Request, plans: dict[str, str]) -> web.StreamResponse:
    """Answer as the plan for this message says; each chunk carries the message that it answers."""
    said = [part["text"] for content in (await request.json())["contents"] for part in content["parts"]]
    message = next(text for text in reversed(said) if text in plans)  # not a request to go on with its answer
    session_id = ASKED.search(message)[1]  # type: ignore[index]
    plan = plans[message]
    if plan == "again":
        plans[message] = "whole"
        return await status(503, Retry_After="0")(request)
    if plan == "forbidden":
        return await status(403)(request)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if plan not in ("blocked", "empty"):
        for number in range(4):
            await response.write(event(f"{message}{number} "))
            if plan == "gated":
                await GATES[session_id].wait()
            elif plan in ("slow", "reset"):
                await asyncio.sleep(0.01)
            elif plan == "stalled" and number == 1:
                await asyncio.Event().wait()
    if plan == "reset":
        request.transport.abort()  # type: ignore[union-attr]
    elif plan == "malformed":
        await response.write(b"data: {\n\n")
    elif plan == "blocked":
        await response.write(event(finish="SAFETY"))
    elif plan != "cut off":
        await response.write(event(finish="STOP"))
    return response


@asynccontextmanager
async def running(folder: Path, counts: Counts) -> AsyncIterator[tuple[House, GeminiStandIn]]:
    async with GeminiStandIn() as stand_in:
        settings = make_settings(
            f"sqlite:///{folder}/a.db",
            DEMO_MODE=0,
            GEMINI_API_KEY="k",
            GEMINI_BASE_URL=stand_in.url,
            CHUNK_TIMEOUT_SECONDS=2,
            DATABASE_TIMEOUT_SECONDS=0.2,
            MAX_AI_REQUESTS_PER_MINUTE=6000,
            STREAM_CHUNK_INTERVAL_MS=5,
        )
        storage = FaultyStorage(make_storage(settings))
        async with serve(settings, make_counsellor(settings), storage, clock=CLOCK) as server:
            house = House(server, storage, counts, folder / "a.db")
            stand_in.default = lambda request: answer(request, house.plans)
            try:
                yield house, stand_in
            finally:
                house.unlock()


def check_all(
    schedules: list[Schedule], results: list[BaseException | None], lines: list[str], refusals: Collection[str]
) -> None:
    for schedule, result in zip(schedules, results, strict=True):
        name = f"session={anonymous(schedule.id)} "
        outcomes = [re.search(r"outcome=(\w+)", line) for line in lines if name in line]
        try:
            assert result is None, repr(result)
            schedule.check([match[1] for match in outcomes if match], refusals)
        except AssertionError as error:
            error.add_note(f"{schedule.id}: {', '.join(schedule.script)}")
            raise


def batches() -> list[range]:
    return [range(first, min(first + TOGETHER, SEED + SCHEDULES)) for first in range(SEED, SEED + SCHEDULES, TOGETHER)]


@pytest.mark.timeout(600)
async def test_whatever_happens_every_request_has_one_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "bemore_voice")
    monkeypatch.setattr("bemore_voice.SETTLE_SECONDS", 0.1)
    async with running(tmp_path, Counts(monkeypatch)) as (house, stand_in):
        await asyncio.sleep(0)
        tasks = len(asyncio.all_tasks())
        for seeds in batches():
            schedules = [Schedule(seed, house) for seed in seeds]

            async def run(schedule: Schedule) -> None:
                await schedule.live()
                await schedule.come_to_rest()

            results = await asyncio.gather(*map(run, schedules), return_exceptions=True)
            lines = [record.getMessage() for record in caplog.records]
            caplog.clear()
            check_all(schedules, results, lines, REFUSALS)
        # And all is back where it began.
        await until(lambda: stand_in.ended == len(stand_in.requests))
        await until(lambda: not any(session.sockets or session.task for session in house.server.sessions))
        # What is left are the handlers of the connections to the model that are kept for the next reply.
        await until(lambda: len(asyncio.all_tasks()) <= tasks + stand_in.connections())


@pytest.mark.timeout(600)
async def test_a_stop_at_any_moment_leaves_no_request_without_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "bemore_voice")
    monkeypatch.setattr("bemore_voice.SETTLE_SECONDS", 0.1)
    monkeypatch.setattr("bemore_voice.DRAIN_SECONDS", 0.3)
    counts = Counts(monkeypatch)
    for seeds in batches()[:4]:
        async with running(tmp_path, counts) as (house, _):
            schedules = [Schedule(seed, house) for seed in seeds]

            async def run(schedule: Schedule) -> None:
                with contextlib.suppress(aiohttp.ClientError, ConnectionError):  # nobody is let in any more
                    await schedule.live()

            lives = [asyncio.create_task(run(schedule)) for schedule in schedules]
            await asyncio.sleep(random.Random(seeds[0]).uniform(0.05, 0.4))  # any moment
            for schedule in schedules:
                schedule.stopped = True
            await house.server.runner.cleanup()
            results = await asyncio.gather(*lives, return_exceptions=True)
            for schedule in schedules:
                for page in (schedule.steady, schedule.flapping):
                    await page.leave(cut=False)
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        check_all(schedules, results, lines, (*REFUSALS, "ai_unavailable"))
