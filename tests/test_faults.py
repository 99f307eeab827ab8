"""Faults of the model and of the database, seen from a person's socket: one answer each, and the next reply works."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from model_faults import MODEL_FAULTS, WHOLE, Fault
from standin import GeminiStandIn, event, silent_after, stream
from support import (
    CANARY,
    Frontend,
    ScriptedCounsellor,
    Server,
    Serving,
    Wire,
    kinds_of,
    text_of,
    wire_to_postgres,
)
from tools import until

from bemore_voice import Limits

KEY = "a-key-that-is-not-to-be-seen"


@pytest.fixture
async def impatient(serving_gemini: Serving) -> AsyncIterator[tuple[Server, Frontend]]:
    """A server with little patience for the stand-in, and a socket of it."""
    async with serving_gemini(GEMINI_API_KEY=KEY, FIRST_CHUNK_TIMEOUT_SECONDS=2.5, CHUNK_TIMEOUT_SECONDS=0.5) as server:
        async with server.connect() as client:
            yield server, client


async def check_reply(client: Frontend, text: str, end: str) -> None:
    await client.ask("비밀 이야기")
    frames = await client.reply()
    assert text_of(frames) == text
    assert kinds_of(frames)[-1] == end
    assert kinds_of(frames)[0] == ("begin" if text else "error")
    if end == "error":
        assert frames[-1]["code"] == "ai_unavailable"


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=name) for name, fault in MODEL_FAULTS.items()],
)
async def test_model_fault_costs_one_reply_at_most(
    fault: Fault, gemini: GeminiStandIn, impatient: tuple[Server, Frontend], caplog: pytest.LogCaptureFixture
) -> None:
    server, client = impatient
    gemini.answers.extend(fault.answers)
    await check_reply(client, fault.text, fault.end)
    assert not gemini.answers, "the fault happened"
    await check_reply(client, WHOLE, "complete")
    assert [row[1] for row in await server.rows()][-1] == WHOLE
    assert fault.end == "error" or [row[1] for row in await server.rows()] == [fault.text, WHOLE]
    await until(lambda: gemini.ended == len(gemini.requests))
    assert not any(word in caplog.text for word in ("비밀", "듣고", KEY))


async def test_model_out_of_reach_is_one_error(gemini: GeminiStandIn, impatient: tuple[Server, Frontend]) -> None:
    _, client = impatient
    await gemini.close()
    await check_reply(client, "", "error")
    assert not gemini.requests, "the fault happened"
    await gemini.open()
    await check_reply(client, WHOLE, "complete")


@pytest.mark.parametrize("resumed", [False, True], ids=["first", "continued"])
async def test_cancel_closes_the_stream_of_the_model(
    gemini: GeminiStandIn, impatient: tuple[Server, Frontend], resumed: bool
) -> None:
    server, client = impatient
    gemini.answers.extend([stream(event("가")), silent_after(event("나"))] if resumed else [silent_after(event("가"))])
    await client.ask("하나")
    for _ in range(3 if resumed else 2):
        await client.frame()
    await client.cancel()
    assert (await client.frame())["interrupted"] is True
    await until(lambda: gemini.ended == len(gemini.requests))
    assert [row[1] for row in await server.rows()] == ["가 나" if resumed else "가"]
    await check_reply(client, WHOLE, "complete")


# SQLite


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the database's lock, as another program does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def test_locked_sqlite_delays_the_end_of_a_reply(
    server: Server, counsellor: ScriptedCounsellor, tmp_path: Path
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        await talk.asked.wait()
        with locked(tmp_path / "test.db"):
            talk.say("가").end()
            await client.begun()
            await client.silent()
        assert kinds_of(await client.reply()) == ["complete"]
    assert [row[1] for row in await server.rows()] == ["가"]


async def test_sqlite_locked_for_long_is_one_error_each(
    serving: Serving, counsellor: ScriptedCounsellor, tmp_path: Path
) -> None:
    talk = counsellor.expect()
    async with (
        serving(limits=Limits(store_seconds=0.5), DATABASE_TIMEOUT_SECONDS=0.2) as server,
        server.connect() as client,
    ):
        await client.ask("하나")
        await talk.asked.wait()
        with locked(tmp_path / "test.db"):
            talk.say("가").end()
            frames = await client.reply()
            assert (kinds_of(frames), frames[-1]["code"]) == (["begin", "chunk", "error"], "ai_unavailable")
            await client.ask("둘")
            assert kinds_of(await client.reply()) == ["error"]
        await client.ask("셋")
        assert kinds_of(await client.reply())[-1] == "complete"
        assert [row[0] for row in await server.rows()][-1] == "셋"


async def test_full_disk_is_one_error(
    serving: Serving, counsellor: ScriptedCounsellor, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(limits=Limits(store_seconds=0.3)) as server, server.connect() as client:
        await client.ask()
        await client.reply()
        pages = (await server.storage.fetch("PRAGMA page_count"))[0][0]
        await server.storage.fetch(f"PRAGMA max_page_count = {pages}")
        counsellor.expect().say("가" * 10_000).end()
        await client.ask("안 들어가는 말")
        frames = await client.reply()
        assert (kinds_of(frames)[-1], frames[-1]["code"]) == ("error", "ai_unavailable")
        assert "SQLITE_FULL" in caplog.text
        await server.storage.fetch("PRAGMA max_page_count = 1000000")
        await client.ask("들어가는 말")
        assert kinds_of(await client.reply())[-1] == "complete"
        assert [row[0] for row in await server.rows()] == [CANARY, "들어가는 말"]


# Either database


async def test_slow_database_delays_no_other_stream(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect("가") as slow, server.connect("나") as other:
        await other.ask()
        await talk.asked.wait()
        free = server.faults.hang()
        await slow.ask()
        for number in range(50):
            await talk.say(f"{number} ").heard()
        while kinds_of(other.frames).count("chunk") < 50:
            await other.frame()
        await slow.silent()  # not one statement of its own is through
        free.set()
        assert kinds_of(await slow.reply())[-1] == "complete"
        talk.end()
        assert kinds_of(await other.reply())[-1] == "complete"


async def test_insert_whose_answer_is_lost_stores_one_row(serving: Serving, database_url: str) -> None:
    """The database commits, and the connection fails before it can say so."""
    async with serving(database_url) as server, server.connect() as client:
        for _ in range(2):
            server.faults.lose_answers("INSERT INTO conversations", 1)
            await client.ask("같은 말")
            assert kinds_of(await client.reply())[-1] == "complete"
        assert server.faults.failed == 2
        assert len(await server.rows()) == 2


# Postgres


@asynccontextmanager
async def wired(serving: Serving, postgres_url: str, **values: Any) -> AsyncIterator[tuple[Wire, Server, Frontend]]:
    """A server that reaches Postgres through a wire, and a socket of it."""
    async with wire_to_postgres(postgres_url) as wire:
        url = f"postgresql://postgres@127.0.0.1:{wire.port}/postgres"
        async with serving(url, **values) as server, server.connect() as client:
            yield wire, server, client


async def test_postgres_lost_during_a_reply_loses_nothing(
    serving: Serving, counsellor: ScriptedCounsellor, postgres_url: str
) -> None:
    talk = counsellor.expect().say("가")
    async with wired(serving, postgres_url) as (wire, server, client):
        await client.ask("하나")
        await client.begun()
        wire.down = True
        assert wire.cut()
        talk.say("나").end()
        assert (await client.frame())["data"] == {"chunk": "나"}
        await until(lambda: wire.refused > 1)  # the insert was tried again
        await client.silent()
        wire.down = False
        assert kinds_of(await client.reply()) == ["complete"]
        await client.ask("둘")
        assert kinds_of(await client.reply())[-1] == "complete"
        assert [row[:2] for row in await server.rows()] == [("하나", "가나"), ("둘", "들은 말: 둘")]


async def test_postgres_restart_needs_no_restart_of_the_server(
    serving: Serving, counsellor: ScriptedCounsellor, postgres_url: str, restart_postgres: Callable[[], None]
) -> None:
    talk = counsellor.expect().say("가")
    async with serving(postgres_url) as server, server.connect() as client:
        await client.ask("하나")
        await client.begun()
        await asyncio.to_thread(restart_postgres)
        talk.end()
        assert kinds_of(await client.reply()) == ["complete"]
        await client.ask("둘")
        assert kinds_of(await client.reply())[-1] == "complete"
        assert [row[0] for row in await server.rows()] == ["하나", "둘"]
