"""Storage, on both engines by the same tests."""

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import aiosqlite
import asyncpg
import pytest
from tools import open_storage

from bemore.counsellor import PastTurn
from bemore.storage import (
    Admission,
    CannotStart,
    NewTurn,
    NoToken,
    NotPermitted,
    Storage,
    StorageError,
    Unavailable,
    UnknownSession,
)

NOW = 1_800_000_000_000_000
SECOND = 1_000_000


@pytest.fixture
async def storage(database_url: str) -> AsyncIterator[Storage]:
    async with open_storage(database_url) as opened:
        await opened.create_session("s")
        yield opened


def turn(
    message: str = "안녕", reply: str = "답", emotion: str | None = None, timestamp: int = 1704902400000
) -> NewTurn:
    return NewTurn(message, reply, emotion, timestamp)


async def turns(storage: Storage) -> list[dict[str, object]]:
    return await storage.conversations("s", 200, 2**63 - 1)


async def refusal(awaitable: Awaitable[object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        await awaitable
    return caught.value


async def wait_ms(storage: Storage, now_us: int, per_minute: int) -> int:
    """How long a session without a token is told to wait."""
    with pytest.raises(NoToken) as caught:
        await storage.admit("s", now_us, per_minute)
    return caught.value.retry_after_ms


async def test_a_turn_is_stored_as_it_was_said(storage: Storage) -> None:
    await storage.add_turn("s", turn("불안해요 😥", "그러셨군요.", "anxious"))
    await storage.add_turn("s", turn("두 번째", "네.", None, 2**63 - 1))
    rows = await storage.fetch("SELECT * FROM conversations ORDER BY id")
    assert [tuple(row)[1:6] for row in rows] == [
        ("s", "불안해요 😥", "그러셨군요.", "anxious", 1704902400000),
        ("s", "두 번째", "네.", None, 2**63 - 1),
    ]
    assert all(row[6] is not None for row in rows)


async def test_history_is_the_last_ten_turns_oldest_first(storage: Storage) -> None:
    await storage.create_session("other")
    await storage.add_turn("other", turn("남의 말", "남의 답"))
    for number in range(12):
        # By id and not by the client's clock, which here runs backwards.
        await storage.add_turn("s", turn(f"말 {number}", f"답 {number}", timestamp=100 - number))
    history = (await storage.admit("s", NOW, 10)).history
    assert [(turn.user_message, turn.ai_response) for turn in history] == [(f"말 {n}", f"답 {n}") for n in range(2, 12)]
    assert isinstance(history[0], PastTurn)


async def test_a_turn_that_is_stored_again_is_stored_once(storage: Storage) -> None:
    first, second = turn("같은 말", "같은 답"), turn("같은 말", "같은 답")
    for said in (first, first, second, second, first):
        await storage.add_turn("s", said)
    assert len(await turns(storage)) == 2


async def test_a_full_bucket_allows_a_burst_then_a_steady_rate(storage: Storage) -> None:
    for _ in range(10):
        await storage.admit("s", NOW, 10)
    assert await wait_ms(storage, NOW, 10) == 6000
    assert await wait_ms(storage, NOW + 6 * SECOND - 1, 10) == 1
    await storage.admit("s", NOW + 6 * SECOND, 10)
    assert await wait_ms(storage, NOW + 6 * SECOND, 10) == 6000
    for _ in range(10):  # a minute later the bucket is full, and no fuller
        await storage.admit("s", NOW + 600 * SECOND, 10)
    assert await wait_ms(storage, NOW + 600 * SECOND, 10) == 6000


async def test_admit_creates_a_session_once_if_told_to(storage: Storage) -> None:
    """Also when two requests come at the same moment, and while the session is marked."""
    await asyncio.gather(
        *(storage.admit("new", NOW, 10, create=True) for _ in range(10)),
        *(storage.mark_at_risk("new", create=True) for _ in range(10)),
    )
    with pytest.raises(NoToken):
        await storage.admit("new", NOW, 10, create=True)
    assert [row[0] for row in await storage.fetch("SELECT session_id FROM sessions ORDER BY session_id")] == [
        "new",
        "s",
    ]
    assert (await storage.admit("new", NOW + 6 * SECOND, 10)).at_risk


async def test_a_clock_that_stepped_back_locks_no_session_out(storage: Storage) -> None:
    """The bucket counts as full once, and as usual from then on."""
    for _ in range(10):
        await storage.admit("s", NOW + 600 * SECOND, 10)
    for _ in range(10):
        await storage.admit("s", NOW, 10)
    assert await wait_ms(storage, NOW, 10) == 6000
    assert await wait_ms(storage, NOW - 9 * SECOND, 10) == 15_000  # a step within what replicas' clocks may differ


async def test_a_replica_whose_clock_is_behind_fills_no_bucket(storage: Storage) -> None:
    """Of two replicas whose clocks are nine seconds apart, neither gives the other a token."""
    taken = 0
    for quarter in range(4 * 60):
        now = NOW + quarter * SECOND // 4
        with contextlib.suppress(NoToken):
            await storage.admit("s", now - 9 * SECOND * (quarter % 2), 10)
            taken += 1
    assert 10 < taken <= 20


async def test_one_session_does_not_use_up_anothers_tokens(storage: Storage) -> None:
    await storage.create_session("other")
    await storage.admit("s", NOW, 1)
    await refusal(storage.admit("s", NOW, 1))
    await storage.admit("other", NOW, 1)


@pytest.mark.parametrize("per_minute", [1, 7, 10, 6000])
async def test_every_rate_holds_to_the_token(storage: Storage, per_minute: int) -> None:
    taken = await asyncio.gather(
        *(storage.admit("s", NOW, per_minute) for _ in range(min(per_minute + 5, 60))),
        return_exceptions=True,
    )
    assert sum(isinstance(one, Admission) for one in taken) == min(per_minute, 60)


async def test_a_bucket_outlives_the_process(database_url: str) -> None:
    url = database_url
    async with open_storage(url) as storage:
        await storage.create_session("s")
        await storage.admit("s", NOW, 1)
    async with open_storage(url) as storage:
        await refusal(storage.admit("s", NOW, 1))


async def test_an_unknown_session_is_expired_wherever_it_is_named(storage: Storage) -> None:
    for operation in (storage.admit("unknown", NOW, 10), storage.add_turn("unknown", turn())):
        assert isinstance(await refusal(operation), UnknownSession)


@pytest.mark.parametrize("table", ["conversations", "token_buckets"])
async def test_ping_fails_without_a_table_that_a_turn_needs(storage: Storage, table: str) -> None:
    await storage.ping()
    await storage.fetch(f"ALTER TABLE {table} RENAME TO gone")
    try:
        assert isinstance(await refusal(storage.ping()), Unavailable)
    finally:
        await storage.fetch(f"ALTER TABLE gone RENAME TO {table}")
    await storage.ping()


def held_in(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("test.db*")) if path.suffix != ".db-shm"]


async def test_ping_writes_nothing(storage: Storage, database_url: str, tmp_path: Path) -> None:
    """Postgres writes of its own accord now and then, but not between every two statements."""

    async def state() -> list[object]:
        if database_url.startswith("sqlite"):
            return list(held_in(tmp_path))
        current = "SELECT pg_current_wal_insert_lsn()::text, txid_current_snapshot()::text"
        return [tuple(row) for row in await storage.fetch(current)]

    states = [await state()]
    for _ in range(5):
        await storage.ping()
        states.append(await state())
    assert any(before == after for before, after in itertools.pairwise(states))


async def test_an_answer_after_a_failure_is_one_line_in_the_log(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bemore_voice")
    await storage.ping()
    for _ in range(3):
        with pytest.raises(Unavailable):
            await storage.fetch("SELECT * FROM nothing")
    await storage.ping()
    await storage.ping()
    assert caplog.text.count("the database answers again, after") == 1


async def test_deleting_a_session_deletes_all_that_it_said(storage: Storage) -> None:
    await storage.admit("s", NOW, 10)
    await storage.add_turn("s", turn())
    await storage.fetch("DELETE FROM sessions")
    for table in ("conversations", "token_buckets"):
        assert not list(await storage.fetch(f"SELECT * FROM {table}"))


async def test_schema_is_applied_again_without_loss(database_url: str) -> None:
    said = turn()
    for _ in range(3):
        async with open_storage(database_url) as storage:
            await storage.create_session("s")
            await storage.add_turn("s", said)
            assert len(await turns(storage)) == 1
    async with open_storage(database_url) as storage:
        assert len(await storage.fetch("SELECT * FROM sessions")) == 1


async def test_every_text_that_passes_the_protocol_can_be_stored(storage: Storage) -> None:
    texts = [
        "한글 조합: 한",
        "👨‍👩‍👧‍👦🏳️‍🌈",
        "\u202eعربي\u202c",
        "\ufffd",
        "'; DROP TABLE sessions; --",
        "$1 %s :x ?",
        "\x01\x7f",
    ]
    for text in texts:
        await storage.add_turn("s", turn(text, text))
    assert [turn["ai_response"] for turn in await turns(storage)] == texts
    assert [turn.user_message for turn in (await storage.admit("s", NOW, 10)).history] == texts


# One engine alone


@pytest.mark.parametrize(
    ("definition", "missing"),
    [
        ("sessions (id TEXT PRIMARY KEY)", "its table sessions has no column session_id"),
        ("conversations (session_id, role, content, timestamp, created_at)", "its table conversations has no column"),
        (
            "conversations (id, session_id, user_message, ai_response, emotion, timestamp, created_at, role)",
            "its table conversations has no column turn_key",
        ),
    ],
)
async def test_a_file_of_another_program_is_not_altered(tmp_path: Path, definition: str, missing: str) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "theirs.sqlite")) as other:
        other.execute(f"CREATE TABLE {definition}")
    with pytest.raises(CannotStart, match=missing):
        async with open_storage(f"sqlite:///{tmp_path}/theirs.sqlite"):
            pass
    with contextlib.closing(sqlite3.connect(tmp_path / "theirs.sqlite")) as other:
        made = other.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        assert made == [(f"CREATE TABLE {definition}",)]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)


async def test_a_file_of_an_earlier_version_is_completed(tmp_path: Path) -> None:
    async with open_storage(f"sqlite:///{tmp_path}/a.db") as storage:
        await storage.create_session("s")
        await storage.fetch("DROP INDEX idx_conversations_turn_key")
        await storage.fetch("ALTER TABLE conversations DROP turn_key")
        await storage.fetch("ALTER TABLE token_buckets DROP at_risk")
    async with open_storage(f"sqlite:///{tmp_path}/a.db") as storage:
        await storage.mark_at_risk("s")
        await storage.add_turn("s", turn())
        assert len(await turns(storage)) == 1


async def test_sqlite_does_all_or_nothing_of_what_was_given_up(tmp_path: Path) -> None:
    async with open_storage(f"sqlite:///{tmp_path}/a.db") as storage:
        given_up = 0
        for passes in range(6):
            admitting = asyncio.create_task(storage.admit(f"{passes}", NOW, 10, create=True))
            for _ in range(passes):
                await asyncio.sleep(0)
            admitting.cancel()
            await asyncio.wait([admitting])
            given_up += admitting.cancelled()
        assert given_up >= 2
        await storage.admit("s", NOW, 10, create=True)
        created = {row[0] for row in await storage.fetch("SELECT session_id FROM sessions")}
        admitted = {row[0] for row in await storage.fetch("SELECT session_id FROM token_buckets")}
        assert created == admitted


async def test_sqlite_has_foreign_keys_wal_and_a_busy_timeout(tmp_path: Path) -> None:
    async with open_storage(f"sqlite:///{tmp_path}/a.db", 3) as storage:
        names = ("foreign_keys", "journal_mode", "synchronous")
        assert [(await storage.fetch(f"PRAGMA {name}"))[0][0] for name in names] == [1, "wal", 1]
        assert 2900 < (await storage.fetch("PRAGMA busy_timeout"))[0][0] <= 3000
    assert (tmp_path / "a.db").exists()


async def test_sqlite_gives_ids_once(tmp_path: Path) -> None:
    async with open_storage(f"sqlite:///{tmp_path}/a.db") as storage:
        await storage.create_session("s")
        await storage.add_turn("s", turn())
        await storage.fetch("DELETE FROM conversations")
        await storage.add_turn("s", turn())
        assert [turn["id"] for turn in await turns(storage)] == [2]


async def test_sqlite_in_a_folder_that_is_not_there_fails_by_name(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="unable to open"):
        async with open_storage(f"sqlite:///{tmp_path}/no/a.db"):
            pass


async def test_a_file_that_is_no_database_fails_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_text("not a database, but long enough to look like one" * 20)
    with pytest.raises(CannotStart, match="not a database"):
        async with open_storage(f"sqlite:///{tmp_path}/a.db"):
            pass


async def test_psql_takes_schema_as_it_is(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    schema = (Path(__file__).parent.parent / "schema.sql").read_text(encoding="utf-8")
    for _ in range(2):
        await connection.execute(schema)
    names = await connection.fetch(
        "SELECT indexname AS name FROM pg_indexes WHERE tablename = 'conversations'"
        " UNION SELECT conname FROM pg_constraint WHERE conrelid = 'conversations'::regclass"
    )
    await connection.close()
    expected = {"conversations_session_id_fkey", "idx_conversations_session"}
    expected |= {"idx_conversations_timestamp", "idx_conversations_created_at"}
    assert expected <= {row["name"] for row in names}


async def test_replicas_start_together_on_an_empty_postgres(postgres_url: str) -> None:
    async def start() -> None:
        async with open_storage(postgres_url) as storage:
            await storage.ping()

    await asyncio.gather(*(start() for _ in range(6)))


async def test_replicas_share_one_bucket(postgres_url: str) -> None:
    url = postgres_url
    async with open_storage(url) as one, open_storage(url) as other:
        await one.create_session("s")
        taken = await asyncio.gather(
            *(storage.admit("s", NOW, 10) for storage in (one, other) for _ in range(10)),
            return_exceptions=True,
        )
    assert sum(isinstance(one, Admission) for one in taken) == 10


async def test_sessions_that_another_service_owns_are_only_read(postgres_url: str) -> None:
    """Its table has a column that must be filled, and our role may neither add rows nor create tables."""
    owner = await asyncpg.connect(postgres_url)
    schema = (Path(__file__).parent.parent / "schema.sql").read_text(encoding="utf-8")
    await owner.execute("CREATE TABLE sessions (session_id VARCHAR(255) PRIMARY KEY, user_name TEXT NOT NULL)")
    await owner.execute(schema)
    await owner.execute(
        "INSERT INTO sessions VALUES ('theirs', 'kim'); DROP ROLE IF EXISTS voice; CREATE ROLE voice LOGIN;"
        "GRANT SELECT, REFERENCES ON sessions TO voice; GRANT SELECT, INSERT ON conversations TO voice;"
        "GRANT SELECT, INSERT, UPDATE ON token_buckets TO voice;"
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO voice;"
        "GRANT USAGE ON SCHEMA public TO voice"
    )
    try:
        async with open_storage(postgres_url.replace("postgres:@", "voice:@")) as storage:
            await storage.admit("theirs", NOW, 10)
            await storage.add_turn("theirs", turn())
            with pytest.raises(NotPermitted):
                await storage.create_session("ours")
        async with open_storage(postgres_url) as storage:
            with pytest.raises(NotPermitted):
                await storage.create_session("ours")
    finally:
        await owner.execute("DROP OWNED BY voice; DROP ROLE voice")
        await owner.close()


async def test_the_private_name_of_aiosqlite_is_still_there(tmp_path: Path) -> None:
    """sqlite.py runs a function in aiosqlite's thread, which no public method does."""
    async with aiosqlite.connect(tmp_path / "a.sqlite") as thread:
        assert await thread._execute(lambda number: number + 1, 1) == 2  # type: ignore[no-untyped-call]
