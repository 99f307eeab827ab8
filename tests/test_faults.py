"""Faults of the model and of the database, seen from a person's socket: one answer each, and the next reply works."""

import asyncio
import gzip
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from standin import Answer, GeminiStandIn, event, reset_after, silent_after, status, stream
from support import (
    CANARY,
    Client,
    FaultyStorage,
    ScriptedCounsellor,
    Server,
    Serving,
    Wire,
    kinds_of,
    make_settings,
    serve,
    text_of,
)
from tools import until

from bemore.care import BLOCKED_REPLY
from bemore_voice import make_counsellor, make_storage

WHOLE = "네, 듣고 있어요."
HANGUL = event("가나다", "STOP")
MIDDLE = HANGUL.index("나".encode()) + 1

# name: the answers in turn, then the text and the end that the person gets
UPSTREAM: dict[str, tuple[list[Answer], str, str]] = {
    "status 400": ([status(400)], "", "error"),
    "status 401": ([status(401)], "", "error"),
    "status 403": ([status(403)], "", "error"),
    "status 404": ([status(404)], "", "error"),
    "status 429 once": ([status(429)], WHOLE, "complete"),
    "status 429 with a short Retry-After": ([status(429, Retry_After="0")], WHOLE, "complete"),
    "status 429 with a Retry-After beyond the budget": ([status(429, Retry_After="30")], "", "error"),
    "status 429 with a Retry-After in a year": ([status(429, Retry_After=formatdate(4e9, usegmt=True))], "", "error"),
    "status 429 with a Retry-After of a huge zone offset": (
        [status(429, Retry_After="Mon, 01 Jan 2024 00:00:00 -9999999999999999")],
        WHOLE,
        "complete",
    ),
    "status 500 once": ([status(500)], WHOLE, "complete"),
    "status 503 twice": ([status(503)] * 2, WHOLE, "complete"),
    "status 503 for good": ([status(503)] * 30, "", "error"),
    "a reset before the first chunk": ([reset_after()], WHOLE, "complete"),
    "a first chunk that never comes": ([silent_after()], "", "error"),
    "a stream that stalls": ([silent_after(event("가"))], f"가 {WHOLE}", "complete"),
    "a stream that stalls twice": ([silent_after(event("가")), silent_after(event("나"))], "가 나", "error"),
    "a stream that is reset": ([reset_after(event("가"))], f"가 {WHOLE}", "complete"),
    "a stream that is reset twice": ([reset_after(event("가")), reset_after(event("나"))], "가 나", "error"),
    "a stream that ends without a finish reason": ([stream(event("가"))], f"가 {WHOLE}", "complete"),
    "a stream that ends without a finish reason twice": ([stream(event("가")), stream(event("나"))], "가 나", "error"),
    "a stream that is reset and then refused": ([reset_after(event("가")), status(503)], "가", "error"),
    "a malformed event": ([stream(event("가"), b"data: {\n\n")], f"가 {WHOLE}", "complete"),
    "HTML with status 200": (
        [stream(b"<html>\n<p>data: x</p>\n", headers={"Content-Type": "text/html"})],
        WHOLE,
        "complete",
    ),
    "an answer that is gzip although nobody asked for it": (
        [stream(gzip.compress(event("가", "STOP")), headers={"Content-Encoding": "gzip"})],
        "",
        "error",
    ),
    "an empty STOP": ([stream(event("", "STOP"))], WHOLE, "complete"),
    "MAX_TOKENS with text": ([stream(event("가."), event(finish="MAX_TOKENS"))], "가.", "complete"),
    "MAX_TOKENS without text": ([stream(event(finish="MAX_TOKENS"))], WHOLE, "complete"),
    "SAFETY before text": ([stream(event(finish="SAFETY"))], BLOCKED_REPLY, "complete"),
    "SAFETY after text": ([stream(event("가"), event(finish="SAFETY"))], f"가 {BLOCKED_REPLY}", "complete"),
    "a blocked prompt": (
        [stream(b'data: {"promptFeedback": {"blockReason": "SAFETY"}}\n\n')],
        BLOCKED_REPLY,
        "complete",
    ),
    "thought-only parts": (
        [stream(b'data: {"candidates": [{"content": {"parts": [{"text": "hm", "thought": true}]}}]}\n\n', HANGUL)],
        "가나다",
        "complete",
    ),
    "a chunk split inside a Hangul character": ([stream(HANGUL[:MIDDLE], HANGUL[MIDDLE:])], "가나다", "complete"),
    "one byte at a time": ([stream(*(bytes([byte]) for byte in HANGUL))], "가나다", "complete"),
    "a 900 KiB line": ([stream(event("가", "STOP", signature="A" * 900 * 1024))], "가", "complete"),
    "a 3 MiB line": (
        [stream(event("가"), event("나", "STOP", signature="A" * 3 * 1024 * 1024))],
        f"가 {WHOLE}",
        "complete",
    ),
}


@pytest.fixture
async def asked(gemini: GeminiStandIn, tmp_path: Path) -> AsyncIterator[tuple[Server, Client]]:
    """A server that asks the stand-in, with little patience, and a socket of it."""
    settings = make_settings(
        f"sqlite:///{tmp_path}/a.db",
        DEMO_MODE=0,
        GEMINI_API_KEY="a-key-that-nobody-may-see",
        GEMINI_BASE_URL=gemini.url,
        FIRST_CHUNK_TIMEOUT_SECONDS=4,
        CHUNK_TIMEOUT_SECONDS=0.5,
    )
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        yield server, client


async def check_reply(client: Client, text: str, end: str) -> None:
    await client.ask("비밀 이야기")
    frames = await client.reply()
    assert text_of(frames) == text
    assert kinds_of(frames)[-1] == end
    assert kinds_of(frames)[0] == ("begin" if text else "error")
    if end == "error":
        assert frames[-1]["code"] == "ai_unavailable"


@pytest.mark.parametrize("name", UPSTREAM)
async def test_upstream(
    name: str, gemini: GeminiStandIn, asked: tuple[Server, Client], caplog: pytest.LogCaptureFixture
) -> None:
    server, client = asked
    answers, text, end = UPSTREAM[name]
    gemini.answers.extend(answers)
    await check_reply(client, text, end)
    gemini.answers.clear()
    await check_reply(client, WHOLE, "complete")
    assert [row[1] for row in await server.rows()] == ([text] if end == "complete" else []) + [WHOLE]
    assert gemini.ended == len(gemini.requests)
    assert not any(word in caplog.text for word in ("비밀", "듣고", "nobody-may-see"))


@pytest.mark.parametrize("name", ["a refused connection", "a name that nobody knows"])
async def test_upstream_that_cannot_be_reached(name: str, gemini: GeminiStandIn, tmp_path: Path) -> None:
    url = gemini.url if "refused" in name else "http://nobody.invalid"
    settings = make_settings(
        f"sqlite:///{tmp_path}/a.db",
        DEMO_MODE=0,
        GEMINI_API_KEY="k",
        GEMINI_BASE_URL=url,
        FIRST_CHUNK_TIMEOUT_SECONDS=5,
    )
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        if "refused" in name:
            await gemini.close()
        await check_reply(client, "", "error")
        if "refused" in name:
            await gemini.open()
            await check_reply(client, WHOLE, "complete")
        await client.silent()


async def test_cancel_closes_the_models_stream(gemini: GeminiStandIn, asked: tuple[Server, Client]) -> None:
    server, client = asked
    gemini.answers.append(silent_after(event("가")))
    await client.ask("하나")
    assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
    await client.send("cancel_ai_response")
    assert (await client.frame())["interrupted"] is True
    await until(lambda: gemini.ended == 1)
    assert [row[1] for row in await server.rows()] == ["가"]
    await check_reply(client, WHOLE, "complete")


async def test_cancel_closes_the_stream_of_the_rest(gemini: GeminiStandIn, asked: tuple[Server, Client]) -> None:
    server, client = asked
    gemini.answers.extend([stream(event("가")), silent_after(event("나"))])
    await client.ask("하나")
    assert kinds_of([await client.frame() for _ in range(3)]) == ["begin", "chunk", "chunk"]
    await client.send("cancel_ai_response")
    assert (await client.frame())["interrupted"] is True
    await until(lambda: gemini.ended == 2)
    assert [row[1] for row in await server.rows()] == ["가 나"]
    await check_reply(client, WHOLE, "complete")


async def test_no_chunk_comes_later_than_50_ms_after_a_cancel(
    gemini: GeminiStandIn, asked: tuple[Server, Client]
) -> None:
    _, client = asked

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(event("가 "))
            await asyncio.sleep(0.005)

    gemini.default = drip
    late = []
    for _ in range(9):
        await client.ask()
        frames = [await client.frame() for _ in range(5)]
        await client.send("cancel_ai_response")
        cancelled = last = time.perf_counter()
        while (frame := await client.frame())["type"] == "ai_stream_chunk":
            last = time.perf_counter()
        assert (frame["type"], frame["interrupted"]) == ("ai_stream_complete", True)
        assert kinds_of(frames)[:2] == ["begin", "chunk"]
        late.append(last - cancelled)
    assert statistics.median(late) < 0.05
    await until(lambda: gemini.ended == 9)


# The database


async def test_locked_sqlite_holds_a_reply_up_until_it_is_free(
    server: Server, counsellor: ScriptedCounsellor, tmp_path: Path
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        await talk.asked.wait()
        lock = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        talk.say("가").end()
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
        await client.silent()
        lock.execute("ROLLBACK")
        lock.close()
        assert kinds_of(await client.reply()) == ["complete"]
    assert [row[1] for row in await server.rows()] == ["가"]


async def test_locked_sqlite_for_good_is_one_error_and_then_well_again(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.STORE_SECONDS", 0.5)
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", DATABASE_TIMEOUT_SECONDS=0.2)
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask("하나")
        await talk.asked.wait()
        lock = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        talk.say("가").end()
        frames = await client.reply()
        assert (kinds_of(frames), frames[-1]["code"]) == (["begin", "chunk", "error"], "ai_unavailable")
        await client.ask("둘")
        assert kinds_of(await client.reply()) == ["error"]
        lock.execute("ROLLBACK")
        lock.close()
        await client.ask("셋")
        assert kinds_of(await client.reply())[-1] == "complete"
        assert [row[0] for row in await server.rows()][-1] == "셋"


async def test_a_full_disk_is_one_error_and_then_well_again(
    server: Server, counsellor: ScriptedCounsellor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bemore_voice.STORE_SECONDS", 0.3)
    async with server.connect() as client:
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


async def test_a_slow_database_does_not_hold_up_other_sessions_streams(
    counsellor: ScriptedCounsellor, tmp_path: Path
) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    storage = FaultyStorage(make_storage(settings))
    async with serve(settings, counsellor, storage) as server, server.connect("나") as other:
        talk = counsellor.expect()
        await other.ask()
        await talk.asked.wait()
        answered = asyncio.Event()

        async def two_seconds(_: str) -> None:
            await asyncio.sleep(2)
            answered.set()

        storage.wait = two_seconds
        async with server.connect() as slow:
            answered.clear()
            await slow.ask()
            for number in range(50):
                talk.say(f"{number} ")
                while (await other.frame())["type"] != "ai_stream_chunk":
                    pass
            assert not answered.is_set()  # fifty chunks, and not one statement of the other session's
            assert kinds_of(await slow.reply())[-1] == "complete"
            storage.wait = None
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


async def open_postgres(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    folder = url.partition("host=")[2]
    return await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")


def settings_through(wire: Wire, **values: object) -> Any:
    return make_settings(
        f"postgresql://postgres@127.0.0.1:{wire.port}/postgres",
        AUTO_CREATE_SESSIONS=1,
        MAX_AI_REQUESTS_PER_MINUTE=60,
        **values,
    )


async def test_postgres_gone_for_three_seconds_in_the_middle_of_a_reply_loses_nothing(
    counsellor: ScriptedCounsellor, postgres_url: str
) -> None:
    async with Wire(lambda: open_postgres(postgres_url)) as wire:
        settings = settings_through(wire)
        async with serve(settings, counsellor) as server, server.connect() as client:
            talk = counsellor.expect()
            await client.ask("하나")
            talk.say("가")
            assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
            wire.down = True
            wire.cut()
            talk.say("나").end()
            assert (await client.frame())["data"] == {"chunk": "나"}
            await asyncio.sleep(3)
            await client.silent()
            wire.down = False
            assert kinds_of(await client.reply()) == ["complete"]
            await client.ask("둘")
            assert kinds_of(await client.reply())[-1] == "complete"
            assert [row[:2] for row in await server.rows()] == [("하나", "가나"), ("둘", "들은 말: 둘")]


async def test_postgres_away_costs_the_requests_of_that_time_an_error_and_never_the_socket(
    counsellor: ScriptedCounsellor, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Wire(lambda: open_postgres(postgres_url)) as wire:
        async with serve(settings_through(wire), counsellor) as server, server.connect() as client:
            await client.ask()
            await client.reply()
            wire.down = True
            wire.cut()
            for _ in range(3):
                await client.ask()
                (frame,) = await client.reply()
                assert frame["code"] == "ai_unavailable"
            wire.down = False
            await client.ask()
            assert kinds_of(await client.reply())[-1] == "complete"
            assert "database: " in caplog.text


async def test_postgres_that_answers_nothing_is_given_up_in_time(
    counsellor: ScriptedCounsellor, postgres_url: str
) -> None:
    async with Wire(lambda: open_postgres(postgres_url)) as wire:
        settings = settings_through(wire, DATABASE_TIMEOUT_SECONDS=0.5)
        async with serve(settings, counsellor) as server, server.connect() as client:
            wire.freeze()
            async with asyncio.timeout(5):
                await client.ask()
                (frame,) = await client.reply()
            assert frame["code"] == "ai_unavailable"
            wire.cut()
            await client.ask()
            assert kinds_of(await client.reply())[-1] == "complete"


async def test_postgres_restarts_without_the_server_restarting(
    counsellor: ScriptedCounsellor, postgres_url: str, restart_postgres: Callable[[], None]
) -> None:
    settings = make_settings(postgres_url, AUTO_CREATE_SESSIONS=1)
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask("하나")
        talk.say("가")
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
        await asyncio.to_thread(restart_postgres)
        talk.end()
        assert kinds_of(await client.reply()) == ["complete"]
        await client.ask("둘")
        assert kinds_of(await client.reply())[-1] == "complete"
        assert [row[0] for row in await server.rows()] == ["하나", "둘"]
