"""Databases that lock, hang, fill up or lose what they hold: a turn is stored once or not at all, and nobody waits."""

import asyncio
import contextlib
import os
import random
import resource
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from standin import GeminiStandIn
from support import (
    CANARY,
    FaultyStorage,
    Program,
    ScriptedCounsellor,
    Wire,
    kinds_of,
    make_settings,
    serve,
    started,
)
from tools import PATIENCE, open_storage, until

import bemore_voice
from bemore.postgres import MAX_CONNECTIONS, MIN_CONNECTIONS, Link, Postgres
from bemore.storage import (
    ADD_TURN,
    CREATE_SESSION,
    WITHDRAW_TURN,
    NewTurn,
    NoToken,
    NotPermitted,
    Storage,
    Unavailable,
)

NOW = 1_800_000_000_000_000
Lock = Callable[[], AbstractAsyncContextManager[None]]


@pytest.fixture(params=["sqlite", "postgres"])
def engine_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/a.db" if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def lock(engine_url: str) -> Lock:
    """What another program does to the table of turns for as long as a test says."""

    @asynccontextmanager
    async def locked() -> AsyncIterator[None]:
        if engine_url.startswith("sqlite"):
            other = sqlite3.connect(engine_url.removeprefix("sqlite:///"), isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")
            other.close()
        else:
            connection = await asyncpg.connect(engine_url)
            async with connection.transaction():
                await connection.execute("LOCK TABLE conversations IN SHARE MODE")  # read, and not written
                yield
            await connection.close()

    return locked


async def backends(url: str, condition: str = "TRUE") -> int:
    """Count the server's processes for this database's clients, but for the one that asks."""
    connection = await asyncpg.connect(url)
    count = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        f" WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND {condition}"
    )
    await connection.close()
    return int(count)


async def none_waits(url: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while await backends(url, "wait_event_type = 'Lock'"):  # noqa: ASYNC110 - Postgres tells of no event
            await asyncio.sleep(0.02)


# Statements that are given up


async def test_a_locked_table_leaves_no_backend_behind_and_shuts_no_other_client_out(
    counsellor: ScriptedCounsellor, postgres_url: str
) -> None:
    settings = make_settings(postgres_url, AUTO_CREATE_SESSIONS=1, DATABASE_TIMEOUT_SECONDS=0.5)
    locker = await asyncpg.connect(postgres_url)
    others = await backends(postgres_url)
    async with serve(settings, counsellor) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect(str(number))) for number in range(40)]
        async with locker.transaction():
            await locker.execute("LOCK TABLE token_buckets, conversations")
            for _ in range(3):
                await asyncio.gather(*(client.ask() for client in clients))
                ends = [(await client.reply())[-1] for client in clients]
                assert {end["code"] for end in ends} == {"ai_unavailable"}
                assert await backends(postgres_url) - others <= MAX_CONNECTIONS
            await none_waits(postgres_url)  # the server was told, too, while the lock is still held
        for client in clients:
            await client.ask()
            assert kinds_of(await client.reply())[-1] == "complete"
    await locker.close()


@pytest.mark.parametrize("seconds", [0.1, 0.25])
async def test_a_turn_behind_a_lock_is_stored_once(
    counsellor: ScriptedCounsellor, engine_url: str, lock: Lock, seconds: float
) -> None:
    """However often its insert was given up while it waited for the lock."""
    settings = make_settings(engine_url, AUTO_CREATE_SESSIONS=1, DATABASE_TIMEOUT_SECONDS=seconds)
    storage = FaultyStorage(bemore_voice.make_storage(settings))
    async with serve(settings, counsellor, storage) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect(str(number))) for number in range(6)]
        talks = [counsellor.expect() for _ in clients]
        for client in clients:
            await client.ask("하나")
        for talk in talks:
            await talk.asked.wait()
        async with lock():
            for talk in talks:
                talk.say("가나다").end()
            await until(lambda: storage.statements.count(ADD_TURN) >= 3 * len(clients))
        for client in clients:
            assert kinds_of(await client.reply()) == ["begin", "chunk", "complete"]
        await storage.settled()
        for number in range(len(clients)):
            assert [row[0] for row in await server.rows(str(number))] == ["하나"]


async def test_a_turn_that_was_told_failed_is_not_in_the_table(
    counsellor: ScriptedCounsellor, engine_url: str, lock: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "STORE_SECONDS", 1)
    monkeypatch.setattr(bemore_voice, "SETTLE_SECONDS", 0.1)
    settings = make_settings(engine_url, AUTO_CREATE_SESSIONS=1, DATABASE_TIMEOUT_SECONDS=3)
    async with serve(settings, counsellor) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect(str(number))) for number in range(6)]
        talks = [counsellor.expect() for _ in clients]
        for client in clients:
            await client.ask("하나")
        for talk in talks:
            await talk.asked.wait()
        async with lock():
            for talk in talks:
                talk.say("가나다").end()
            for client in clients:
                frames = await client.reply()
                assert (kinds_of(frames)[-1], frames[-1]["code"]) == ("error", "ai_unavailable")
        await until(lambda: not any(session.task for session in server.sessions))
        for number, client in enumerate(clients):
            assert await server.rows(str(number)) == []
            await client.ask("둘")
            assert kinds_of(await client.reply())[-1] == "complete"
            assert [row[0] for row in await server.rows(str(number))] == ["둘"]
    assert all(not prompt.history for prompt in counsellor.prompts)  # what failed is not what was said before


class Mute(FaultyStorage):
    """Commits the next turn, and never says so."""

    mute = True

    async def fetch(self, sql: str, *values: object) -> Any:
        rows = await super().fetch(sql, *values)
        if sql == ADD_TURN and values[0] and self.mute:
            await asyncio.Event().wait()
        return rows


async def test_a_turn_that_was_stored_without_an_answer_is_withdrawn_again(
    counsellor: ScriptedCounsellor, engine_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "STORE_SECONDS", 0.5)
    settings = make_settings(engine_url, AUTO_CREATE_SESSIONS=1)
    storage = Mute(bemore_voice.make_storage(settings))
    async with serve(settings, counsellor, storage) as server, server.connect() as client:
        await client.ask("하나")
        assert kinds_of(await client.reply())[-1] == "error"
        storage.mute = False
        await client.ask("둘")
        assert kinds_of(await client.reply())[-1] == "complete"
        assert [row[0] for row in await server.rows()] == ["둘"]
    assert counsellor.prompts[-1].history == []


async def test_where_it_may_not_be_withdrawn_the_session_goes_on(
    counsellor: ScriptedCounsellor, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role that may add turns, and not delete them."""
    monkeypatch.setattr(bemore_voice, "STORE_SECONDS", 0.5)
    async with open_storage(postgres_url):
        owner = await asyncpg.connect(postgres_url)
    await owner.execute(
        "DROP ROLE IF EXISTS adder; CREATE ROLE adder LOGIN; GRANT USAGE ON SCHEMA public TO adder;"
        "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO adder;"
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO adder"
    )
    settings = make_settings(postgres_url.replace("postgres:@", "adder:@"), AUTO_CREATE_SESSIONS=1)
    storage = Mute(bemore_voice.make_storage(settings))
    try:
        async with serve(settings, counsellor, storage) as server, server.connect() as client:
            await client.ask("하나")
            assert kinds_of(await client.reply())[-1] == "error"
            storage.mute = False
            for _ in range(2):
                await client.ask("둘")
                assert kinds_of(await client.reply())[-1] == "complete"
    finally:
        await owner.execute("DROP OWNED BY adder; DROP ROLE adder")
        await owner.close()


async def test_cancels_past_any_rate_cost_no_connection(counsellor: ScriptedCounsellor, postgres_url: str) -> None:
    """Requests, each with a cancel behind it, from sockets that come again and again: the backends stay the same."""
    settings = make_settings(postgres_url, AUTO_CREATE_SESSIONS=1)
    request, cancel = ("request_ai_response", {"message": "안녕하세요"}), ("cancel_ai_response", None)
    async with serve(settings, counsellor) as server, server.connect("other") as other:
        watching = await asyncpg.connect(postgres_url)

        async def pids() -> set[int]:
            rows = await watching.fetch(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            return {row["pid"] for row in rows}

        before = await pids()
        for number in range(10):
            async with server.connect(f"cancelling {number}") as client:
                await client.send_together(*[request, cancel] * 25)
                await other.ask()
                assert kinds_of(await other.reply())[-1] in ("complete", "error")  # past its rate, for the last ones
                assert kinds_of(await client.reply())[-1] == "complete"
        await server.storage.settled()
        assert before <= await pids()
        await watching.close()


# Prepared statements


async def prepared_names(storage: Postgres) -> list[str]:
    """The names that one of the pool's connections knows."""
    link = await storage._pool.take()
    try:
        rows = await link.connection.fetch("SELECT name FROM pg_prepared_statements WHERE name LIKE 'bemore%'")
    finally:
        storage._pool.give_back(link)
    return [row["name"] for row in rows]


async def talk_in_turns(storage: Storage, session_id: str, number: int) -> None:
    await storage.create_session(session_id)
    for turn in range(number):
        await storage.admit(session_id, NOW, 6000)
        await storage.add_turn(session_id, NewTurn(f"말 {turn}", "답", None, turn))


async def said_in(url: str, session_id: str) -> list[object]:
    async with open_storage(url) as storage:
        return [turn["user_message"] for turn in await storage.conversations(session_id, 200, 2**53)]


async def test_statements_are_prepared_where_postgres_is_reached_directly(postgres_url: str) -> None:
    async with Postgres(postgres_url, 5) as storage:
        await talk_in_turns(storage, "s", 3)
        assert len(await prepared_names(storage)) >= 2
        assert storage.prepares


async def test_a_pooler_that_keeps_none_is_found_out_without_a_lost_or_doubled_turn(
    pgbouncer: str, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """PgBouncer 1.18 in transaction mode, with fewer server connections than there are clients."""
    caplog.set_level("INFO", "bemore_voice")
    async with Postgres(pgbouncer, 5) as storage:
        sessions = [f"s{number}" for number in range(12)]
        await asyncio.gather(*(talk_in_turns(storage, session, 10) for session in sessions))
        assert not storage.prepares
    assert caplog.text.count("does not keep prepared statements") == 1
    for session in sessions:
        assert await said_in(postgres_url, session) == [f"말 {number}" for number in range(10)]


async def test_a_pooler_that_is_put_in_between_while_it_runs_costs_no_turn(pgbouncer: str, postgres_url: str) -> None:
    folder, port = postgres_url.partition("host=")[2], int(pgbouncer.rpartition(":")[2].partition("/")[0])
    pooled = False

    async def target() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if pooled:
            return await asyncio.open_connection("127.0.0.1", port)
        return await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")

    async with Wire(target) as wire, Postgres(f"postgresql://postgres@127.0.0.1:{wire.port}/postgres", 5) as storage:
        await asyncio.gather(*(talk_in_turns(storage, f"direct {number}", 5) for number in range(8)))
        assert storage.prepares
        pooled = True
        wire.cut()

        async def talk(session_id: str) -> None:
            """As the server does: once more what the cut connections failed, with the same key."""
            turns = [NewTurn(f"말 {number}", "답", None, number) for number in range(10)]
            for step in [storage.create_session, *[lambda s, t=turn: storage.add_turn(s, t) for turn in turns]]:
                while True:
                    with contextlib.suppress(Unavailable):
                        await step(session_id)
                        break
                await storage.admit(session_id, NOW, 6000)

        sessions = [f"pooled {number}" for number in range(12)]
        await asyncio.gather(*(talk(session) for session in sessions))
        assert not storage.prepares
    for session in sessions:
        assert await said_in(postgres_url, session) == [f"말 {number}" for number in range(10)]


# The pool


async def test_a_burst_takes_what_comes_free_and_an_idle_process_goes_back_to_five(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore.postgres.IDLE_SECONDS", 0.2)
    others = await backends(postgres_url)  # a pooler's
    async with Postgres(postgres_url, 5) as storage:
        await asyncio.gather(*(storage.fetch("SELECT pg_sleep(0.05)") for _ in range(60)))
        grown = await backends(postgres_url) - others
        assert MIN_CONNECTIONS < grown <= MAX_CONNECTIONS
        async with asyncio.timeout(PATIENCE):
            while await backends(postgres_url) - others > MIN_CONNECTIONS:  # noqa: ASYNC110 - Postgres tells of no event
                await asyncio.sleep(0.05)
        await storage.ping()


# Clocks


async def test_a_bucket_of_a_clock_that_was_set_back_counts_as_empty(database_url: str) -> None:
    async with open_storage(database_url) as storage:
        await storage.create_session("s")
        await storage.admit("s", NOW + 600_000_000, 10)
        for _ in range(2):
            with pytest.raises(NoToken) as caught:
                await storage.admit("s", NOW, 10)
            assert caught.value.retry_after_ms == 6000
        await storage.admit("s", NOW + 6_000_000, 10)
        with pytest.raises(NoToken):
            await storage.admit("s", NOW + 6_000_000, 10)


# Health


async def health(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(f"{url}/health") as response:
        return response.status, (await response.json())["database"]


async def test_health_tells_of_a_file_that_is_gone_and_nothing_is_confirmed_into_it(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "STORE_SECONDS", 0.3)
    path = tmp_path / "a.db"
    async with serve(make_settings(f"sqlite:///{path}"), counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask("하나")
        await talk.asked.wait()
        for name in ("a.db", "a.db-wal", "a.db-shm"):
            os.unlink(tmp_path / name)
        assert await health(server.url) == (503, "unavailable")
        talk.say("가").end()
        assert (await client.reply())[-1]["code"] == "ai_unavailable"
        sqlite3.connect(path).executescript("PRAGMA user_version = 1").close()  # somebody puts a file back
        assert await health(server.url) == (200, "ok")
        async with server.connect("new") as other:
            await other.ask("둘")
            assert kinds_of(await other.reply())[-1] == "complete"
        assert [row[0] for row in await server.rows("new")] == ["둘"]


@pytest.mark.parametrize("table", ["conversations", "token_buckets"])
async def test_health_tells_of_a_dropped_table(counsellor: ScriptedCounsellor, engine_url: str, table: str) -> None:
    async with serve(make_settings(engine_url), counsellor) as server:
        assert await health(server.url) == (200, "ok")
        await server.storage.fetch(f"DROP TABLE {table}")
        assert await health(server.url) == (503, "unavailable")


async def test_health_tells_of_a_full_disk(tmp_path: Path) -> None:
    async with started(tmp_path) as program:
        url = f"http://127.0.0.1:{program.port}"
        assert await health(url) == (200, "ok")
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        assert await health(url) == (503, "unavailable")
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert await health(url) == (200, "ok")


# A process that is killed


async def talk_until_killed(program: Program, session_id: str, said: list[str]) -> None:
    """Ask one thing after another, and note what was told complete."""
    with contextlib.suppress(aiohttp.ClientError, AssertionError):  # the end of the connection
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


async def test_a_process_that_is_killed_fifty_times_has_lost_nothing_that_it_told_complete(
    gemini: GeminiStandIn, tmp_path: Path
) -> None:
    """Two at a time, each on a file of its own."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    values = {"GEMINI_API_KEY": "k", "GEMINI_BASE_URL": gemini.url}
    lives = [live_and_die(folder, range(25), random.Random(seed), **values) for seed, folder in enumerate(folders)]
    for folder, told in zip(folders, await asyncio.gather(*lives), strict=True):
        assert len(told) >= 25
        with contextlib.closing(sqlite3.connect(folder / "bemore.db")) as database:
            stored = [row[0] for row in database.execute("SELECT user_message FROM conversations")]
        assert set(told) <= set(stored)
        assert len(stored) == len(set(stored))


def held_in(folder: Path) -> bytes:
    """What the database's files hold."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob("bemore.db*")))


async def test_what_was_erased_is_gone_from_the_file_of_a_process_that_is_killed(
    gemini: GeminiStandIn, tmp_path: Path
) -> None:
    async with started(tmp_path, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url) as program:
        async with program.connect() as client:
            await client.ask(CANARY)
            await client.reply()
            assert CANARY.encode() in held_in(tmp_path)
        async with aiohttp.ClientSession() as http:
            async with http.delete(f"http://127.0.0.1:{program.port}/api/sessions/s") as response:
                assert response.status == 204
        program.process.kill()
        await program.process.wait()
    held = held_in(tmp_path)
    assert held.startswith(b"SQLite format 3")
    assert CANARY.encode() not in held


# Files that are replaced, mended or taken away


async def test_a_file_that_could_not_be_opened_whole_is_not_used(tmp_path: Path) -> None:
    """Its replacement is locked at first: without foreign keys, an erasure would leave all that was said."""
    path = tmp_path / "a.db"
    async with open_storage(f"sqlite:///{path}", 0.3) as storage:
        await talk_in_turns(storage, "s", 3)
        other = sqlite3.connect(tmp_path / "b.db", isolation_level=None)  # in rollback mode, as a restored backup
        other.executescript("CREATE TABLE something (a); BEGIN EXCLUSIVE; INSERT INTO something VALUES (1)")
        for name in ("a.db", "a.db-wal", "a.db-shm"):
            os.unlink(tmp_path / name)
        os.rename(tmp_path / "b.db", path)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await storage.ping()
        other.execute("ROLLBACK")
        other.close()
        await talk_in_turns(storage, "s", 3)
        assert (await storage.fetch("PRAGMA foreign_keys"))[0][0] == 1
        await storage.delete_session("s")
        assert not list(await storage.fetch("SELECT * FROM conversations"))


async def test_a_log_that_is_taken_away_costs_no_turn_that_is_told_after_it(tmp_path: Path) -> None:
    async with open_storage(f"sqlite:///{tmp_path}/a.db") as storage:
        await talk_in_turns(storage, "s", 3)
        for name in ("a.db-wal", "a.db-shm"):
            os.unlink(tmp_path / name)
        await storage.add_turn("s", NewTurn("다음", "답", None, 3))
        copies = [(name, (tmp_path / name).read_bytes()) for name in ("a.db", "a.db-wal")]
    (tmp_path / "killed").mkdir()
    for name, held in copies:  # as a process that is killed leaves them
        (tmp_path / "killed" / name).write_bytes(held)
    with contextlib.closing(sqlite3.connect(tmp_path / "killed" / "a.db")) as database:
        assert ("다음",) in database.execute("SELECT user_message FROM conversations").fetchall()


async def test_a_file_that_was_damaged_is_well_again_once_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with open_storage(f"sqlite:///{path}", 0.5) as storage:
        await talk_in_turns(storage, "s", 3)
    sound = path.read_bytes()
    async with open_storage(f"sqlite:///{path}", 0.5) as storage:
        path.write_bytes(sound[:100] + b"\xff" * (len(sound) - 100))
        with pytest.raises(Unavailable):
            await storage.conversations("s", 10, 2**53)
        path.write_bytes(sound)
        await until_well(storage)
        await talk_in_turns(storage, "s", 1)


async def until_well(storage: Storage) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(Unavailable):
                await storage.ping()
                return


async def test_a_folder_that_cannot_be_looked_into_for_a_while_stops_nothing_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_storage(f"sqlite:///{tmp_path}/a.db", 0.3) as storage:
        await talk_in_turns(storage, "s", 1)
        stat = os.stat

        def refuse(path: Any, **options: Any) -> os.stat_result:
            if str(path).startswith(str(tmp_path)):
                raise PermissionError
            return stat(path, **options)

        monkeypatch.setattr("os.stat", refuse)
        with pytest.raises(Unavailable):
            await storage.ping()
        monkeypatch.undo()
        await storage.ping()


# Connections that are not what they seem


async def test_connections_that_were_dropped_without_a_word_cost_a_person_no_answer(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a balancer or a NAT, while nobody asked anything; new ones are let through."""
    monkeypatch.setattr("bemore.postgres.DOUBT_SECONDS", 0.2)
    folder = postgres_url.partition("host=")[2]

    async def target() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")

    async with Wire(target) as wire, Postgres(f"postgresql://postgres@127.0.0.1:{wire.port}/postgres", 5) as storage:
        await talk_in_turns(storage, "s", 1)
        await asyncio.sleep(0.3)  # nobody asks
        wire.strand()
        await talk_in_turns(storage, "s", 2)
        assert len(await storage.conversations("s", 10, 2**53)) == 3


async def test_a_connection_that_never_rests_is_not_asked_whether_it_is_there(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore.postgres.DOUBT_SECONDS", 0.3)
    probed: list[Link] = []
    answers = Link.answers

    async def noted(link: Link, seconds: float, *, cancels: int = 0) -> bool:
        probed.append(link)
        return await answers(link, seconds, cancels=cancels)

    monkeypatch.setattr(Link, "answers", noted)
    async with Postgres(postgres_url, 5) as storage:
        loop = asyncio.get_running_loop()
        ends = loop.time() + 1

        async def ask_again_and_again() -> None:
            while loop.time() < ends:
                await storage.fetch("SELECT pg_sleep(0.01)")

        await asyncio.gather(*(ask_again_and_again() for _ in range(60)))
        assert not probed
        storage._pool.doubt()
        await storage.ping()
        assert probed


async def test_a_backend_that_is_terminated_is_a_fault_like_any_other(postgres_url: str) -> None:
    watching = await asyncpg.connect(postgres_url)
    async with Postgres(postgres_url, 5) as storage:
        await storage.create_session("s")
        for number in range(40):
            await watching.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND datname = current_database()"
            )
            turn = NewTurn(f"{number}", "답", None, number)
            async with asyncio.timeout(PATIENCE):
                while True:
                    with contextlib.suppress(Unavailable):  # and nothing else
                        await storage.add_turn("s", turn)
                        break
        said = await storage.conversations("s", 200, 2**53)
        assert [turn["user_message"] for turn in said] == [f"{number}" for number in range(40)]
    await watching.close()


@pytest.mark.parametrize("pooler", ["pgbouncer", "pgbouncer_that_ignores"])
async def test_a_lock_behind_a_pooler_leaves_no_backend_waiting(
    request: pytest.FixtureRequest, postgres_url: str, pooler: str
) -> None:
    """It keeps statement_timeout away, and passes on what was given up while it waited in its queue."""
    url = request.getfixturevalue(pooler)
    locker = await asyncpg.connect(postgres_url)
    async with Postgres(url, 0.3) as storage:
        await storage.create_session("s")
        before = await backends(postgres_url)
        async with locker.transaction():
            await locker.execute("LOCK TABLE token_buckets")
            for _ in range(5):
                results = await asyncio.gather(
                    *(storage.admit("s", NOW, 6000) for _ in range(40)), return_exceptions=True
                )
                assert all(isinstance(result, Unavailable) for result in results)
                assert await backends(postgres_url) <= before + 3  # the pooler's own limit
        await until_well(storage)
        await storage.admit("s", NOW, 6000)
    await none_waits(postgres_url)
    await locker.close()


# What is owed when the process ends


async def test_a_mark_that_is_owed_is_set_before_the_process_ends(
    counsellor: ScriptedCounsellor, engine_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database was away when somebody in danger spoke, and is back before the next try was due."""
    monkeypatch.setattr(bemore_voice, "STORE_SECONDS", 0.2)
    monkeypatch.setattr(bemore_voice, "CLOSE_SECONDS", 0.2)
    settings = make_settings(engine_url, AUTO_CREATE_SESSIONS=1)
    storage = FaultyStorage(bemore_voice.make_storage(settings))
    async with serve(settings, counsellor, storage) as server, server.connect() as client:
        await client.silent()
        storage.fail()
        await client.ask("죽고 싶어요")
        assert kinds_of(await client.reply())[-1] == "complete"
        ending = asyncio.create_task(server.runner.cleanup())
        await until(lambda: server.sessions.draining)
        storage.heal()
        await ending
    async with open_storage(engine_url) as opened:
        assert (await opened.admit("가", NOW, 10)).at_risk


async def test_a_mark_waits_for_nothing_else_that_is_owed(
    counsellor: ScriptedCounsellor, engine_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn failed before, and its withdrawal hangs, as behind a connection that was dropped without a word."""
    monkeypatch.setattr(bemore_voice, "STORE_SECONDS", 0.5)
    monkeypatch.setattr(bemore_voice, "WITHDRAWAL_SECONDS", 0.1)
    settings = make_settings(engine_url, AUTO_CREATE_SESSIONS=1)
    storage = Mute(bemore_voice.make_storage(settings))
    async with serve(settings, counsellor, storage) as server, server.connect() as client:
        await client.ask("하나")
        assert kinds_of(await client.reply())[-1] == "error"
        gone_on = asyncio.Event()

        async def hang(sql: str) -> None:
            if sql == WITHDRAW_TURN:
                await gone_on.wait()

        storage.wait, storage.mute = hang, False
        await client.ask("죽고 싶어요")
        assert kinds_of(await client.reply())[-1] == "complete"
        assert (await storage.admit("가", NOW, 6000)).at_risk
        gone_on.set()


async def test_a_session_that_may_not_be_made_is_forgotten(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody in danger spoke in it: the mark that is owed can never be set, which the log says once."""
    for name in ("STORE_SECONDS", "SETTLE_SECONDS", "RESUME_SECONDS"):
        monkeypatch.setattr(bemore_voice, name, 0.1)
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    storage = FaultyStorage(bemore_voice.make_storage(settings))

    async def forbid(sql: str) -> None:
        if sql == CREATE_SESSION:
            raise NotPermitted("database: test")

    storage.wait = forbid
    async with serve(settings, counsellor, storage) as server:
        async with server.connect() as client:
            await client.ask("죽고 싶어요")
            assert kinds_of(await client.reply())[-1] == "complete"
        await until(lambda: not server.sessions)
    assert caplog.text.count("is at risk, and has no mark") == 1


async def test_a_turn_that_failed_is_withdrawn_before_the_process_ends(
    counsellor: ScriptedCounsellor, engine_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "STORE_SECONDS", 0.3)
    monkeypatch.setattr(bemore_voice, "CLOSE_SECONDS", 0.2)
    settings = make_settings(engine_url, AUTO_CREATE_SESSIONS=1)
    storage = Mute(bemore_voice.make_storage(settings))
    async with serve(settings, counsellor, storage) as server, server.connect() as client:
        await client.silent()
        talk = counsellor.expect()
        await client.ask("하나")
        await talk.asked.wait()

        async def away(sql: str) -> None:
            if sql != ADD_TURN:
                raise Unavailable("database: test")

        storage.wait = away
        talk.say("가").end()
        assert kinds_of(await client.reply())[-1] == "error"
        storage.wait = None
        await server.runner.cleanup()
    async with open_storage(engine_url) as opened:
        assert not await opened.conversations("가", 10, 2**53)


async def test_a_clock_that_goes_behind_anothers_fills_no_bucket(database_url: str) -> None:
    """Of two replicas whose clocks are nine seconds apart, neither gives the other a token."""
    async with open_storage(database_url) as storage:
        await storage.create_session("s")
        taken = 0
        for quarter in range(4 * 60):
            now = NOW + quarter * 250_000
            with contextlib.suppress(NoToken):
                await storage.admit("s", now - 9_000_000 * (quarter % 2), 10)
                taken += 1
        assert taken <= 20
