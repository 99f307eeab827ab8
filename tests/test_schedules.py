"""Random lives of sessions on a running server, and what must hold after each.

SCHEDULES is how many (50), SEED the first one's number. A failure names its seed: SCHEDULES=1 SEED=n runs it alone.
"""

import asyncio
import contextlib
import os
import random
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from standin import GeminiStandIn, event, status
from support import ENDS, Frame, Frontend, Sent, Server, Serving, kinds_of, text_of
from tools import until

from bemore.care import FIRST, SHORT
from bemore.log import anonymous
from bemore_voice import Limits

SCHEDULES = int(os.environ.get("SCHEDULES", "50"))
SEED = int(os.environ.get("SEED", "0"))
TOGETHER = 25  # schedules under way at once, each in a session of its own

ACTIONS = ["ask", "ask", "ask", "ask", "risk", "bad", "cancel", "together", "burst", "cut", "cut", "close", "return",
           "return", "break", "heal", "lock", "release", "wait", "wait"]  # fmt: skip
PLANS = ["whole", "whole", "gated", "gated", "slow", "again", "forbidden", "reset", "cut off", "malformed", "blocked",
         "empty", "stalled"]  # fmt: skip
PREPARED = (*FIRST.values(), *SHORT.values())
CANCEL: Sent = ("cancel_ai_response", None)
ASKED = re.compile(r"<(schedule-+\d+)/\d+>")


def replies_of(frames: list[Frame]) -> list[list[Frame]]:
    """Group the frames of a page by the reply that they belong to, refusals left out."""
    replies: list[list[Frame]] = [[]]
    for frame in sorted((frame for frame in frames if "seq" in frame), key=lambda frame: int(frame["seq"])):
        replies[-1].append(frame)
        if frame["type"] in ENDS:
            replies.append([])
    return [reply for reply in replies if reply]


class House:
    """What the sessions share: a server, its model, and what happens to all of it."""

    def __init__(self, path: Path) -> None:
        self.server: Server
        self.plans: dict[str, str] = {}
        self.gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.met: Counter[str] = Counter()  # plans and locks that happened
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
            self.met["lock"] += 1
            self._lock = other
            asyncio.get_running_loop().call_later(seconds, self.unlock)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rows(self, session_id: str) -> list[tuple[str, str]]:
        """Return message and reply of each turn."""
        with contextlib.closing(sqlite3.connect(self._path)) as other:
            query = "SELECT user_message, ai_response FROM conversations WHERE session_id = ?"
            return other.execute(query, (session_id,)).fetchall()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer as the plan for this message says; each chunk carries the message that it answers."""
        said = [part["text"] for content in (await request.json())["contents"] for part in content["parts"]]
        message = next(text for text in reversed(said) if text in self.plans)  # not a request to go on
        plan = self.plans[message]
        self.met[plan] += 1
        if plan == "again":
            self.plans[message] = "whole"
            return await status(503, Retry_After="0")(request)
        if plan == "forbidden":
            return await status(403)(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if plan not in ("blocked", "empty"):
            await self.say_words(response, message, plan)
        if plan == "reset":
            request.transport.abort()  # type: ignore[union-attr]
        elif plan == "malformed":
            await response.write(b"data: {\n\n")
        elif plan == "blocked":
            await response.write(event(finish="SAFETY"))
        elif plan != "cut off":
            await response.write(event(finish="STOP"))
        return response

    async def say_words(self, response: web.StreamResponse, message: str, plan: str) -> None:
        found = ASKED.search(message)
        assert found is not None
        for number in range(4):
            await response.write(event(f"{message}{number} "))
            if plan == "gated":
                await self.gates[found[1]].wait()
            elif plan in ("slow", "reset"):
                await asyncio.sleep(0.01)
            elif plan == "stalled" and number == 1:
                await asyncio.Event().wait()


class Schedule:
    """One session's random life, seen by a page that stays and by one that comes and goes."""

    def __init__(self, seed: int, house: House) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.id = f"schedule-{seed}"
        self.house = house
        self.steady, self.flapping = self.new_page(), self.new_page()
        self.asked = self.signals = self.refused = 0
        self.dropping = False  # a cancel may have dropped a waiting request
        self.script: list[str] = []

    def new_page(self) -> Frontend:
        return self.house.server.frontend(self.id, timeout=aiohttp.ClientWSTimeout(ws_close=1))

    def question(self, opening: str = "", plan: str = "") -> Sent:
        message = f"{opening}<{self.id}/{self.asked}>"
        plan = plan or self.random.choice(PLANS)
        self.script[-1] += f" {plan}"
        self.house.plans[message] = plan
        self.asked += 1
        return "request_ai_response", {"message": message, "emotion": "sad"}

    async def send(self, *frames: Sent) -> None:
        """Send frames in one packet, and wait until the server has acted on them."""
        page = self.random.choice([self.steady, self.flapping])
        page = page if page.is_open else self.steady
        await page.send_together(*frames)
        await page.settle()

    async def act(self, action: str) -> None:
        server = self.house.server
        match action:
            case "ask":
                await self.send(self.question())
            case "risk":
                self.signals += 1
                await self.send(self.question("죽고 싶어요 "))
            case "bad":
                self.refused += 1
                await self.send(("request_ai_response", {"message": " "}))
            case "cancel":
                self.dropping = True
                await self.send(CANCEL)
            case "together":
                self.dropping = True
                await self.send(self.question(), CANCEL)
            case "burst":
                self.dropping = True
                async with server.connect(self.id) as page:
                    await page.send_together(*[frame for _ in range(20) for frame in (self.question(), CANCEL)])
                    await page.settle()
            case "cut" if self.flapping.is_open:
                await self.flapping.cut()
            case "close" if self.flapping.is_open:
                await self.flapping.close()
                self.flapping = self.new_page()  # a page loaded anew has seen nothing
            case "return" if not self.flapping.is_open:
                await self.flapping.open()
            case "break":
                server.faults.broken.add(self.id)
            case "heal":
                server.faults.broken.discard(self.id)
            case "lock":
                self.house.lock(self.random.uniform(0, 0.4))
            case "release":
                self.house.gates[self.id].set()
            case "wait":
                await asyncio.sleep(self.random.uniform(0, 0.03))

    async def live(self) -> None:
        await self.steady.open()
        await self.flapping.open()
        for _ in range(self.random.randint(3, 14)):
            self.script.append(self.random.choice(ACTIONS))
            await self.act(self.script[-1])

    async def meet_all(self) -> None:
        """Let every fault happen, which a random life may not."""
        await self.steady.open()
        await self.flapping.open()
        for plan in PLANS:
            self.script.append("ask")
            await self.steady.send(*self.question(plan=plan))
        for action in ("risk", "lock", "break", "risk"):
            self.script.append(action)
            await self.act(action)

    async def come_to_rest(self) -> None:
        """Mend all, and ask once more: what comes before the answer to that has come."""
        for action in ("release", "heal", "return"):
            await self.act(action)
        await self.house.server.until_idle(self.id)
        await self.steady.settle()
        self.script.append("last")
        while not self.has_ended():
            await self.steady.send(*self.question(plan="whole"))
            with contextlib.suppress(TimeoutError):  # a lock that another session met has failed it
                while not self.has_ended():
                    await self.steady.frame(patience=2)
        while self.flapping.frames[-1:] != self.steady.frames[-1:]:
            await self.flapping.frame()
        for page in (self.steady, self.flapping):
            await page.close()

    def has_ended(self) -> bool:
        """Tell whether the last reply is a whole one to the last request."""
        replies = replies_of(self.steady.frames)
        return self.script[-1] != "last" and bool(replies) and self.is_whole(replies[-1])

    def is_whole(self, reply: list[Frame]) -> bool:
        return f"/{self.asked - 1}>" in text_of(reply) and kinds_of(reply)[-1] == "complete"

    def check(self, lines: list[str], *, stopped: bool = False) -> None:
        """Check what both pages, the table and the log say of the same session."""
        replies = replies_of(self.steady.frames)
        seen = []
        for reply in replies:
            kinds = kinds_of(reply)
            assert kinds in (["complete"], ["error"]) or kinds[:2] == ["begin", "chunk"], kinds
            assert kinds[1:-1] == ["chunk"] * (len(kinds) - 2), kinds
            assert len(set(re.findall(r"<(.*?)>", text_of(reply)))) <= 1, "a frame of one reply inside another"
            seen.append("interrupted" if reply[-1].get("interrupted") else reply[-1].get("code", "complete"))
        begun = False
        for frame in self.steady.frames:  # in the order in which they came
            assert not begun or "seq" in frame, "a refusal inside a reply"
            begun = frame["type"] not in ENDS
        # Each request has one end, in the order of the log; only a cancel or a stop drops one.
        outcomes = [match[1] for line in lines if (match := re.search(r"outcome=(\w+) .*total_ms", line))]
        rest = iter(outcomes)
        assert all(end in rest for end in seen)
        assert set(Counter(outcomes) - Counter(seen)) <= {"empty_message", "ai_unavailable" if stopped else ""}
        assert len(outcomes) <= self.asked + self.refused
        assert self.dropping or stopped or len(outcomes) == self.asked + self.refused
        # Each risk signal was answered, whatever else was the matter.
        signals = [line for line in lines if "detected_by=words " in line]
        assert stopped or len(signals) == self.signals
        assert all(re.search(r"outcome=(complete|interrupted) ", line) for line in signals)
        # What is stored is what was shown, once; with a signal, what the database allowed.
        shown = Counter(text_of(reply) for reply in replies if reply[-1]["type"] == "ai_stream_complete")
        del shown[""]
        rows = self.house.rows(self.id)
        assert len(rows) == len(set(rows))
        missing = shown - Counter(reply for _, reply in rows)
        assert all(text.startswith(PREPARED) for text in missing), missing
        failed = Counter(text_of(reply) for reply in replies if reply[-1]["type"] == "ai_stream_error")
        assert not Counter(reply for _, reply in rows) - shown - failed
        # A page that has any frame of a reply has all of it, however often it was cut.
        had = [frame for frame in self.flapping.frames if "seq" in frame]
        assert all(frame in self.steady.frames for frame in had)
        for reply in replies:
            part = [frame for frame in reply if frame in had]
            assert stopped or part in ([], reply)


@asynccontextmanager
async def running(serving_gemini: Serving, gemini: GeminiStandIn, folder: Path, limits: Limits) -> AsyncIterator[House]:
    house = House(folder / "test.db")
    gemini.default = house.answer
    times: dict[str, Any] = {
        "FIRST_CHUNK_TIMEOUT_SECONDS": 3,
        "CHUNK_TIMEOUT_SECONDS": 1,
        "DATABASE_TIMEOUT_SECONDS": 0.2,
    }
    async with serving_gemini(limits=limits, STREAM_CHUNK_INTERVAL_MS=5, **times) as server:
        house.server = server
        try:
            yield house
        finally:
            house.unlock()


def check_all(schedules: list[Schedule], results: list[BaseException | None], log: str, *, stopped: bool) -> None:
    for schedule, result in zip(schedules, results, strict=True):
        lines = [line for line in log.splitlines() if f"session={anonymous(schedule.id)} " in line]
        try:
            assert result is None, repr(result)
            schedule.check(lines, stopped=stopped)
        except AssertionError as error:
            error.add_note(f"{schedule.id}: {', '.join(schedule.script)}")
            raise


def batches() -> list[range]:
    return [range(first, min(first + TOGETHER, SEED + SCHEDULES)) for first in range(SEED, SEED + SCHEDULES, TOGETHER)]


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "bemore_voice")
    return caplog


@pytest.mark.timeout(600)
async def test_every_request_has_one_end(
    serving_gemini: Serving, gemini: GeminiStandIn, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    async with running(serving_gemini, gemini, tmp_path, Limits(mark_retry_seconds=0.1)) as house:
        await asyncio.sleep(0)
        tasks = len(asyncio.all_tasks())
        for seeds in [*batches(), [-1]]:
            schedules = [Schedule(seed, house) for seed in seeds]

            async def run(schedule: Schedule) -> None:
                await (schedule.live() if schedule.seed >= 0 else schedule.meet_all())
                await schedule.come_to_rest()

            results = await asyncio.gather(*map(run, schedules), return_exceptions=True)
            check_all(schedules, results, log.text, stopped=False)
            log.clear()
        # And all is back where it began, but for the connections to the model that are kept for the next reply.
        await until(lambda: gemini.ended == len(gemini.requests))
        for schedule in schedules:
            await house.server.until_left(schedule.id)
            await house.server.until_idle(schedule.id)
        await until(lambda: len(asyncio.all_tasks()) <= tasks + gemini.connections())
        assert set(house.met) == {*PLANS, "lock"}, "each fault happened"
        assert house.server.faults.failed


@pytest.mark.timeout(600)
async def test_stop_at_any_moment_leaves_every_request_an_end(
    serving_gemini: Serving,
    gemini: GeminiStandIn,
    tmp_path: Path,
    log: pytest.LogCaptureFixture,
) -> None:
    async def run(schedule: Schedule) -> None:
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):  # the server has stopped
            await schedule.live()
        for page in (schedule.steady, schedule.flapping):
            with contextlib.suppress(ConnectionError):
                while page.is_open:
                    await page.frame()
            await page.close()

    for seeds in batches()[:2]:
        async with running(serving_gemini, gemini, tmp_path, Limits(drain_seconds=0.3)) as house:
            schedules = [Schedule(seed, house) for seed in seeds]
            lives = [asyncio.create_task(run(schedule)) for schedule in schedules]
            await asyncio.sleep(random.Random(seeds[0]).uniform(0.05, 0.4))  # any moment
            await house.server.runner.cleanup()
            results = await asyncio.gather(*lives, return_exceptions=True)
        check_all(schedules, results, log.text, stopped=True)
        log.clear()
