"""KEEP_DAYS and --erase: what is old, or what a person wants gone, is erased with all that was said."""

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import asyncpg
import pytest
from support import CANARY, COMMAND, kinds_of, started
from tools import open_storage

from bemore.postgres import ERASE_LOCK
from bemore.retention import erase_old, keep_erasing
from bemore.storage import ERASE_BATCH, NewTurn, Storage

NOW = 1_800_000_000_000_000
LONG_AGO = "2020-01-01T00:00:00.000Z"


@pytest.fixture
async def storage(database_url: str) -> AsyncIterator[Storage]:
    async with open_storage(database_url) as opened:
        yield opened


async def age(storage: Storage, table: str, session_id: str) -> None:
    """Let a session, or its turns, be made long ago."""
    await storage.fetch(f"UPDATE {table} SET created_at = '{LONG_AGO}' WHERE session_id = '{session_id}'")


async def ids(storage: Storage) -> list[str]:
    return [row[0] for row in await storage.fetch("SELECT session_id FROM sessions ORDER BY session_id")]


async def test_sessions_without_a_turn_in_that_time_are_erased(storage: Storage) -> None:
    """By the last turn, else by the creation, else by a request that is being answered."""
    for session_id in ("answering", "empty", "new", "old", "spoke"):
        await storage.create_session(session_id)
        if session_id in ("old", "spoke"):
            await storage.add_turn(session_id, NewTurn(CANARY, "답", None, 1))
        if session_id != "new":
            await age(storage, "sessions", session_id)
    await age(storage, "conversations", "old")
    await storage.admit("answering", time.time_ns() // 1000, 10)
    await storage.mark_at_risk("old")
    assert await storage.erase_older_than(30) == 2
    assert await ids(storage) == ["answering", "new", "spoke"]
    assert len(await storage.fetch("SELECT * FROM conversations")) == 1
    assert len(await storage.fetch("SELECT * FROM token_buckets")) == 1
    assert await storage.erase_older_than(30) == 0
    assert await storage.erase_older_than(36_500) == 0


async def test_many_are_erased_in_batches_with_one_line(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "bemore_voice")
    for number in range(2 * ERASE_BATCH + 1):
        await storage.create_session(f"{number}")
    await storage.fetch(f"UPDATE sessions SET created_at = '{LONG_AGO}'")
    await storage.create_session("new")
    assert await storage.erase_older_than(1) == ERASE_BATCH
    await erase_old(storage, 1, asyncio.Event())
    assert await ids(storage) == ["new"]
    assert [record.getMessage() for record in caplog.records] == [
        f"KEEP_DAYS: erased {ERASE_BATCH + 1} sessions without a turn in 1 days"
    ]


async def test_old_sessions_are_erased_until_the_server_stops(storage: Storage) -> None:
    """First after the start, then at each interval."""
    stop = asyncio.Event()
    task = asyncio.create_task(keep_erasing(storage, 1, stop, first=0.01, every=0.01))
    for session_id in ("one", "two"):
        await storage.create_session(session_id)
        await age(storage, "sessions", session_id)
        async with asyncio.timeout(10):
            while session_id in await ids(storage):  # noqa: ASYNC110 - a database tells of no event
                await asyncio.sleep(0.01)
    stop.set()
    await task


@pytest.mark.parametrize("pooler", [False, True])
async def test_one_replica_erases_at_a_time(request: pytest.FixtureRequest, postgres_url: str, pooler: bool) -> None:
    url = request.getfixturevalue("pgbouncer") if pooler else postgres_url
    other = await asyncpg.connect(postgres_url)
    async with open_storage(url) as storage:
        await storage.create_session("old")
        await age(storage, "sessions", "old")
        async with other.transaction():
            assert await other.fetchval(f"SELECT pg_try_advisory_xact_lock({ERASE_LOCK})")
            assert await storage.erase_older_than(1) == 0
        assert await storage.erase_older_than(1) == 1
    await other.close()


async def test_a_table_of_sessions_without_their_age_is_told_and_left(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As another service may own it."""
    async with open_storage(postgres_url) as storage:
        await storage.create_session("s")
        await storage.fetch("ALTER TABLE sessions DROP created_at")
        await erase_old(storage, 1, asyncio.Event())
        assert await ids(storage) == ["s"]
    assert caplog.text.count("could not be erased") == 1


def held_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.db*")))


async def test_words_that_are_old_are_gone_from_the_files(tmp_path: Path) -> None:
    async with open_storage(f"sqlite:///{tmp_path}/bemore.db") as storage:
        await storage.create_session("s")
        await storage.add_turn("s", NewTurn(CANARY, "답", None, 1))
        assert CANARY.encode() in held_in(tmp_path)
        for table in ("sessions", "conversations"):
            await age(storage, table, "s")
        assert await storage.erase_older_than(1) == 1
        assert CANARY.encode() not in held_in(tmp_path)


async def test_an_operator_erases_a_session_of_a_running_server(tmp_path: Path, engine_url: str) -> None:
    values = {"AUTO_CREATE_SESSIONS": "1", "DEMO_MODE": "1", "DATABASE_URL": engine_url}
    async with started(tmp_path, **values) as program:
        async with program.connect("-gone") as client:
            await client.ask(CANARY)
            assert kinds_of(await client.reply())[-1] == "complete"
        for status, line in ((0, "bemore_voice: erased the session from "), (2, "bemore_voice: --erase: ")):
            ended, told = await run(tmp_path, "--erase=-gone", values)
            assert (ended, told.startswith(line), len(told.splitlines())) == (status, True, 1)
        if engine_url.startswith("sqlite"):
            assert CANARY.encode() not in held_in(tmp_path)
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{program.port}/api/sessions/-gone/conversations") as response:
                assert response.status == 404


async def run(folder: Path, option: str, values: dict[str, str]) -> tuple[int | None, str]:
    """Run the program to its end; return its status, and what it prints."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, option, cwd=folder, env=os.environ | values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    told = (await process.communicate())[0].decode()
    return process.returncode, told


async def test_a_running_server_erases_what_is_older_than_keep_days(tmp_path: Path) -> None:
    async with open_storage(f"sqlite:///{tmp_path}/bemore.db") as storage:
        for session_id in ("old", "new"):
            await storage.create_session(session_id)
        await age(storage, "sessions", "old")
    async with started(tmp_path, KEEP_DAYS=1) as program:
        await program.wait_for(r"KEEP_DAYS: erased 1 sessions")
    async with open_storage(f"sqlite:///{tmp_path}/bemore.db") as storage:
        assert await ids(storage) == ["new"]
