"""Databases that lock, hang or restart, and processes that are killed: a turn is stored once, or not at all."""

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import aiohttp
import asyncpg
import pytest
from standin import GeminiStandIn
from support import Program, Wire, started
from tools import PATIENCE, open_storage, until

from bemore.postgres import MAX_CONNECTIONS, MIN_CONNECTIONS, Postgres
from bemore.storage import NewTurn, Storage, Unavailable

NOW = 1_800_000_000_000_000
LIVES = 10  # of a process that is killed
Lock = Callable[[], AbstractAsyncContextManager[None]]


@pytest.fixture
def lock(engine_url: str) -> Lock:
    """Another program's lock on the table of turns, for as long as a test says."""

    @asynccontextmanager
    async def locked() -> AsyncIterator[None]:
        if engine_url.startswith("sqlite"):
            with contextlib.closing(
                sqlite3.connect(engine_url.removeprefix("sqlite:///"), isolation_level=None)
            ) as other:
                other.execute("BEGIN IMMEDIATE")
                yield
                other.execute("ROLLBACK")
        else:
            connection = await asyncpg.connect(engine_url)
            async with connection.transaction():
                await connection.execute("LOCK TABLE conversations IN SHARE MODE")  # can be read
                yield
            await connection.close()

    return locked


async def backends(url: str, condition: str = "TRUE") -> int:
    """Count the server processes of this database's clients, without the one that asks."""
    connection = await asyncpg.connect(url)
    count = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        f" WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND {condition}"
    )
    await connection.close()
    return int(count)


async def until_backends(url: str, condition: str, wanted: Callable[[int], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not wanted(await backends(url, condition)):  # noqa: ASYNC110 - Postgres tells of no event
            await asyncio.sleep(0.02)


WAITS_FOR_A_LOCK = "wait_event_type = 'Lock'"


async def talk_in_turns(storage: Storage, session_id: str, number: int) -> None:
    for turn in range(number):
        await storage.admit(session_id, NOW, 6000, create=True)
        await storage.add_turn(session_id, NewTurn(f"말 {turn}", "답", None, turn))


async def said_in(storage: Storage, session_id: str) -> list[object]:
    return [turn["user_message"] for turn in await storage.conversations(session_id, 200, 2**53)]


async def until_stored(storage: Storage, session_id: str, turn: NewTurn) -> int:
    """Store a turn as the server does, again and again; return how often that failed."""
    failures = 0
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await storage.add_turn(session_id, turn)
            except Unavailable:
                failures += 1
            else:
                return failures


# Locks


@pytest.mark.parametrize("seconds", [0.1, 0.25])
async def test_a_turn_behind_a_lock_is_stored_once(engine_url: str, lock: Lock, seconds: float) -> None:
    """However often its insert was given up while it waited."""
    async with open_storage(engine_url, seconds) as storage:
        await storage.create_session("s")
        turns = [NewTurn(f"{number}", "답", None, number) for number in range(6)]
        storing = []
        async with lock():
            storing = [asyncio.create_task(until_stored(storage, "s", turn)) for turn in turns]
            with pytest.raises(Unavailable):
                await storage.add_turn("s", turns[0])
            await asyncio.sleep(2 * seconds)
        failures = await asyncio.gather(*storing)
        assert max(failures) >= 1
        assert sorted(map(str, await said_in(storage, "s"))) == [f"{number}" for number in range(6)]


async def test_a_turn_stored_without_an_answer_is_stored_once(engine_url: str) -> None:
    async with open_storage(engine_url) as storage:
        await storage.create_session("s")
        turn = NewTurn("하나", "답", None, 1)
        for _ in range(3):
            given_up = asyncio.create_task(storage.add_turn("s", turn))
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.wait([given_up])
            assert given_up.cancelled()
        await storage.add_turn("s", turn)
        assert await said_in(storage, "s") == ["하나"]


@pytest.mark.parametrize("pooler", ["", "pgbouncer", "pgbouncer_that_ignores"])
async def test_statements_behind_a_lock_are_cancelled_at_the_server(
    request: pytest.FixtureRequest, postgres_url: str, pooler: str
) -> None:
    """No statement waits on there after its time limit, and all work again at once.

    A pooler that is given up while a request waits in its own queue may pass it on all the same.
    """
    url = request.getfixturevalue(pooler) if pooler else postgres_url
    async with asyncio.timeout(60), open_storage(url, 0.5) as storage:
        await storage.create_session("s")
        others = await backends(postgres_url) if pooler else 0
        locker = await asyncpg.connect(postgres_url)
        async with locker.transaction():
            await locker.execute("LOCK TABLE token_buckets")
            for _ in range(3):
                results = await asyncio.gather(
                    *(storage.admit("s", NOW, 6000) for _ in range(40)), return_exceptions=True
                )
                assert all(isinstance(result, Unavailable) for result in results)
                assert await backends(postgres_url) - others <= 2 * MAX_CONNECTIONS
            if not pooler:
                await until_backends(postgres_url, WAITS_FOR_A_LOCK, lambda count: not count)
        await asyncio.gather(*(storage.admit("s", NOW, 6000) for _ in range(40)))
        await locker.close()


# Poolers and the pool


async def test_a_pooler_in_transaction_mode_mixes_up_no_statements(pgbouncer: str) -> None:
    """It has three connections of its own for twenty of ours."""
    async with open_storage(pgbouncer) as storage:
        sessions = [f"s{number}" for number in range(12)]
        await asyncio.gather(*(talk_in_turns(storage, session, 10) for session in sessions))
        for session in sessions:
            assert await said_in(storage, session) == [f"말 {number}" for number in range(10)]


async def test_the_pool_grows_to_twenty_and_shrinks_to_five(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bemore.postgres.IDLE_SECONDS", 0.2)
    others = await backends(postgres_url)  # of PgBouncer
    async with open_storage(postgres_url) as storage:
        sleeping = [asyncio.create_task(storage.fetch("SELECT pg_sleep(0.3)")) for _ in range(60)]
        await until_backends(postgres_url, "TRUE", lambda count: count - others == MAX_CONNECTIONS)
        await asyncio.gather(*sleeping)
        await until_backends(postgres_url, "TRUE", lambda count: count - others <= MIN_CONNECTIONS)
        await storage.ping()


# Connections that break


async def wired(postgres_url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(f"{postgres_url.partition('host=')[2]}/.s.PGSQL.5432")


async def test_idle_connections_that_a_nat_dropped_cost_no_statement(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore.postgres.IDLE_SECONDS", 0.1)
    accepted = 0

    async def target() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        nonlocal accepted
        accepted += 1
        return await wired(postgres_url)

    async with Wire(target) as wire:
        async with Postgres(f"postgresql://postgres@127.0.0.1:{wire.port}/postgres", 5) as storage:
            await talk_in_turns(storage, "s", 1)
            await until(lambda: accepted >= MIN_CONNECTIONS)
            await asyncio.sleep(0.2)
            wire.strand()
            before = accepted
            await asyncio.gather(*(storage.ping() for _ in range(MIN_CONNECTIONS)))
            assert accepted > before
            await talk_in_turns(storage, "s", 1)


async def test_connections_that_break_silently_cost_one_statement(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One statement runs into its time limit; then all connections are new, and the log says that it is over."""
    caplog.set_level("INFO", "bemore_voice")
    async with Wire(lambda: wired(postgres_url)) as wire:
        async with Postgres(f"postgresql://postgres@127.0.0.1:{wire.port}/postgres", 3) as storage:
            await talk_in_turns(storage, "s", 1)
            wire.strand()
            with pytest.raises(Unavailable, match="TimeoutError"):
                await storage.ping()
            await talk_in_turns(storage, "s", 2)
            assert len(await said_in(storage, "s")) == 3
            wire.strand()
    assert caplog.text.count("the database answers again, after") == 1


async def test_a_database_that_is_away_fails_at_once_and_comes_back(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bemore_voice")
    async with Wire(lambda: wired(postgres_url)) as wire:
        async with Postgres(f"postgresql://postgres@127.0.0.1:{wire.port}/postgres", 5) as storage:
            await talk_in_turns(storage, "s", 1)
            wire.down = True
            wire.cut()
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await storage.admit("s", NOW, 6000)
            assert "answers again" not in caplog.text
            wire.down = False
            await talk_in_turns(storage, "s", 1)
    assert caplog.text.count("the database answers again, after") == 1


async def test_a_backend_that_is_terminated_is_a_fault_like_any_other(postgres_url: str) -> None:
    watching = await asyncpg.connect(postgres_url)
    terminated = 0
    async with open_storage(postgres_url) as storage:
        await storage.create_session("s")
        for number in range(40):
            terminated += await watching.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND datname = current_database()"
            )
            await until_stored(storage, "s", NewTurn(f"{number}", "답", None, number))
        assert await said_in(storage, "s") == [f"{number}" for number in range(40)]
    assert terminated >= 40
    await watching.close()


# A process that is killed


async def talk_until_killed(program: Program, session_id: str, said: list[str]) -> None:
    """Ask one thing after another, and note what was told complete."""
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):  # the process is killed
        async with program.connect(session_id) as client:
            for number in range(1000):
                message = f"{session_id}, {number}"
                await client.ask(message)
                if (await client.reply())[-1]["type"] == "ai_stream_complete":
                    said.append(message)


async def live_and_die(folder: Path, lives: range, moment: random.Random, **values: object) -> list[str]:
    """Start on one file again and again, and be killed at any moment; return what was told complete."""
    told: list[str] = []
    for life in lives:
        async with started(folder, MAX_AI_REQUESTS_PER_MINUTE=6000, STREAM_CHUNK_INTERVAL_MS=0, **values) as program:
            begun: list[str] = []
            talks = [asyncio.create_task(talk_until_killed(program, f"{life}-{number}", begun)) for number in range(4)]
            await until(lambda begun=begun: begun)  # type: ignore[misc]
            await asyncio.sleep(moment.uniform(0, 0.05))
            program.process.kill()
            await asyncio.gather(*talks)
        told += begun
    return told


async def test_a_killed_process_has_lost_no_complete_turn(gemini: GeminiStandIn, tmp_path: Path) -> None:
    """Two at a time, each on a file of its own."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    values = {"GEMINI_API_KEY": "k", "GEMINI_BASE_URL": gemini.url}
    lives = [live_and_die(folder, range(LIVES), random.Random(seed), **values) for seed, folder in enumerate(folders)]
    for folder, told in zip(folders, await asyncio.gather(*lives), strict=True):
        assert len(told) >= LIVES
        with contextlib.closing(sqlite3.connect(folder / "bemore.db")) as database:
            stored = [row[0] for row in database.execute("SELECT user_message FROM conversations")]
        assert set(told) <= set(stored)
        assert len(stored) == len(set(stored))
