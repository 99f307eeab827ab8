"""Random schedules of everything that can happen to a session, and what must hold after each.

SCHEDULES is how many (300), SEED the first one's number. A failure names its seed: SCHEDULES=1 SEED=n runs it alone.
"""

import asyncio
import json
import os
import random
import re
import socket
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from standin import GeminiStandIn, event, status
from support import ENDS, FaultyStorage, Server, kinds_of, make_settings, serve, text_of
from tools import PATIENCE, until

from bemore_voice import anonymous, make_counsellor, make_storage

SCHEDULES = int(os.environ.get("SCHEDULES", "300"))
SEED = int(os.environ.get("SEED", "0"))
TOGETHER = 25  # schedules under way at once, each in a session of its own

ACTIONS = ["ask", "ask", "ask", "ask", "bad", "cancel", "cut", "cut", "close", "return", "return", "break", "heal",
           "release", "wait", "wait"]  # fmt: skip
PLANS = ["whole", "whole", "gated", "gated", "slow", "again", "forbidden", "reset", "cut off", "malformed", "blocked",
         "empty", "stalled"]  # fmt: skip


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

    async def send(self, kind: str, data: object = None) -> None:
        """Send a frame, and wait until the server has acted on it."""
        if self.ws is None:
            return
        await self.ws.send_json({"type": kind, "data": data})
        await self.ws.send_json({"type": "ping"})
        pongs = self.pongs + 1
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: self.pongs >= pongs)

    async def see(self, text: str) -> None:
        """Wait for a reply with this text to end."""
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(
                lambda: any(text in text_of(reply) and reply[-1]["type"] in ENDS for reply in replies_of(self.frames))
            )

    async def reply(self, before: int, patience: float = PATIENCE) -> list[dict[str, Any]]:
        """Wait for the reply after so many, and return its frames."""

        def ended() -> bool:
            replies = replies_of(self.frames)
            return len(replies) > before and replies[before][-1]["type"] in ENDS

        async with asyncio.timeout(patience), self._news:
            await self._news.wait_for(ended)
        return replies_of(self.frames)[before]

    async def leave(self, *, cut: bool) -> None:
        if self.ws is None or self._reader is None:
            return
        if cut:
            self.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        await self.ws.close()
        await self._reader
        self.ws = None


def replies_of(frames: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the frames of a page by the reply that they belong to, refusals left out."""
    replies: list[list[dict[str, Any]]] = [[]]
    for frame in sorted((frame for frame in frames if "seq" in frame), key=lambda frame: frame["seq"]):
        replies[-1].append(frame)
        if frame["type"] in ENDS:
            replies.append([])
    return [reply for reply in replies if reply]


class Schedule:
    """One session's random life."""

    def __init__(self, seed: int, server: Server, storage: FaultyStorage, plans: dict[str, str]) -> None:
        self.random = random.Random(seed)
        self.id = f"schedule-{seed}"
        self.server = server
        self.storage = storage
        self.plans = plans
        self.steady, self.flapping = Page(server, self.id), Page(server, self.id)
        self.asked = 0
        self.asked_since_cancel = 0
        self.cancelled = False
        self.script: list[str] = []

    async def ask(self, page: Page, plan: str) -> str:
        message = f"<{self.id}/{self.asked}>"
        self.plans[message] = plan
        self.asked += 1
        self.asked_since_cancel += 1
        await page.send("request_ai_response", {"message": message, "emotion": "sad"})
        return message

    async def act(self, action: str) -> None:
        page = self.random.choice([self.steady, self.flapping])
        page = page if page.ws is not None else self.steady
        if action == "ask":
            plan = self.random.choice(PLANS)
            self.script[-1] += f" {plan}"
            await self.ask(page, plan)
        elif action == "bad":
            await page.send("request_ai_response", {"message": " "})
        elif action == "cancel":
            self.cancelled, self.asked_since_cancel = True, 0
            await page.send("cancel_ai_response")
        elif action == "cut":
            await self.flapping.leave(cut=True)
        elif action == "close" and self.flapping.ws is not None:
            await self.flapping.leave(cut=False)
            self.flapping = Page(self.server, self.id)  # a page loaded anew knows nothing
        elif action == "return" and self.flapping.ws is None:
            await self.flapping.open()
        elif action == "break":
            self.storage.broken.add(self.id)
        elif action == "heal":
            self.storage.broken.discard(self.id)
        elif action == "release":
            GATES[self.id].set()
        elif action == "wait":
            await asyncio.sleep(self.random.uniform(0, 0.03))

    async def run(self) -> None:
        GATES[self.id].clear()
        await self.steady.open()
        await self.flapping.open()
        for _ in range(self.random.randint(3, 14)):
            self.script.append(self.random.choice(ACTIONS))
            await self.act(self.script[-1])
        await self.act("release")
        await self.act("heal")
        await self.act("return")
        last = await self.ask(self.steady, "whole")
        await self.steady.see(last)
        await self.flapping.see(last)
        await self.steady.leave(cut=False)
        await self.flapping.leave(cut=False)

    async def check(self, outcomes: list[str]) -> None:
        """Check what the steady page, the flapping page, the table and the log say of the same session."""
        frames = [frame for frame in self.steady.frames if "seq" in frame]
        seqs = [frame["seq"] for frame in frames]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        replies = replies_of(frames)
        seen = []
        for reply in replies:
            kinds = kinds_of(reply)
            assert kinds in (["complete"], ["error"]) or kinds[:2] == ["begin", "chunk"], kinds
            assert kinds[1:-1] == ["chunk"] * (len(kinds) - 2), kinds
            assert len(set(re.findall(r"<(.*?)>", text_of(reply)))) <= 1, "a frame of one reply inside another"
            end = reply[-1]
            seen.append("interrupted" if end.get("interrupted") else end.get("code", "complete"))
        # Every request that was accepted has ended once, in the order of the log.
        assert seen == [outcome for outcome in outcomes if outcome != "empty_message"]
        assert self.asked_since_cancel <= len(seen) <= self.asked
        assert self.cancelled or len(seen) == self.asked
        # What is stored is what was shown.
        shown = [text_of(reply) for reply in replies if reply[-1]["type"] == "ai_stream_complete" and text_of(reply)]
        rows = await self.server.rows(self.id)
        assert [row[1] for row in rows] == shown
        assert all(row[0] in row[1] or "109" in row[1] for row in rows)
        # A page that has any frame of a reply has all of it, however often it was cut.
        whole = {frame["seq"]: reply for reply in replies for frame in reply}
        for reply in replies_of(self.flapping.frames):
            assert reply == whole[reply[0]["seq"]]


GATES: dict[str, asyncio.Event] = defaultdict(asyncio.Event)


async def answer(request: web.Request, plans: dict[str, str]) -> web.StreamResponse:
    """Answer as the plan for this message says; each chunk carries the message that it answers."""
    message = (await request.json())["contents"][-1]["parts"][0]["text"]
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
                await GATES[message.strip("<>").partition("/")[0]].wait()
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
async def running(folder: Path, plans: dict[str, str]) -> AsyncIterator[tuple[Server, FaultyStorage, GeminiStandIn]]:
    async with GeminiStandIn() as stand_in:
        stand_in.default = lambda request: answer(request, plans)
        settings = make_settings(
            f"sqlite:///{folder}/a.db",
            DEMO_MODE=0,
            GEMINI_API_KEY="k",
            GEMINI_BASE_URL=stand_in.url,
            CHUNK_TIMEOUT_SECONDS=2,
            MAX_AI_REQUESTS_PER_MINUTE=6000,
            STREAM_CHUNK_INTERVAL_MS=5,
        )
        storage = FaultyStorage(make_storage(settings))
        async with serve(settings, make_counsellor(settings), storage) as server:
            yield server, storage, stand_in


@pytest.mark.timeout(600)
async def test_whatever_happens_every_request_has_one_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "bemore_voice")
    plans: dict[str, str] = {}
    async with running(tmp_path, plans) as (server, storage, stand_in):
        await asyncio.sleep(0)
        tasks = len(asyncio.all_tasks())
        for first in range(SEED, SEED + SCHEDULES, TOGETHER):
            seeds = range(first, min(first + TOGETHER, SEED + SCHEDULES))
            schedules = [Schedule(seed, server, storage, plans) for seed in seeds]
            results = await asyncio.gather(*(schedule.run() for schedule in schedules), return_exceptions=True)
            lines = [record.getMessage() for record in caplog.records]
            caplog.clear()
            for schedule, result in zip(schedules, results, strict=True):
                name = f"session={anonymous(schedule.id)} "
                outcomes = [re.search(r"outcome=(\w+)", line) for line in lines if name in line]
                try:
                    assert result is None, repr(result)
                    await schedule.check([match[1] for match in outcomes if match])
                except AssertionError as error:
                    error.add_note(f"{schedule.id}: {', '.join(schedule.script)}")
                    raise
        # And all is back where it began.
        await until(lambda: stand_in.ended == len(stand_in.requests))
        await until(lambda: not any(session.sockets or session.worker for session in server.sessions))
        # What is left are the handlers of the connections to the model that are kept for the next reply.
        await until(lambda: len(asyncio.all_tasks()) <= tasks + stand_in.connections())
