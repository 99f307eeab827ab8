"""The start on a real Postgres, directly and through PgBouncer: whose tables are there, and what a failure says."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from support import Wire
from tools import open_storage, until

from bemore.postgres import Postgres
from bemore.storage import CannotStart, NewTurn, Storage

NOW = 1_800_000_000_000_000
WAY_OUT = "options=-csearch_path%3Dvoice"

# Another program's tables: what is made, and what the start says of it.
FOREIGN = {
    'sessions ("sessionId" TEXT PRIMARY KEY)': "table sessions .* no column session_id",
    "sessions (session_id UUID PRIMARY KEY)": "table sessions .* column session_id has the type uuid",
    "conversations (id UUID, session_id TEXT, role TEXT, content TEXT, created_at TIMESTAMPTZ)": (
        "table conversations .* no column user_message"
    ),
    "conversations (session_id TEXT, timestamp BIGINT, created_at TIMESTAMPTZ, role TEXT, content TEXT)": (
        "table conversations .* no column user_message"
    ),
    "conversations (id INT, session_id TEXT, user_message TEXT, ai_response TEXT, emotion TEXT, timestamp BIGINT,"
    " created_at TIMESTAMPTZ, role TEXT)": "table conversations .* no column turn_key",
    "conversations (id INT, session_id TEXT, user_message TEXT, ai_response TEXT, emotion TEXT, timestamp BIGINT,"
    " created_at TIMESTAMPTZ, turn_key TEXT, role TEXT NOT NULL)": "table conversations .* column role must be filled",
    "conversations (id INT, session_id TEXT, user_message TEXT, ai_response TEXT, emotion TEXT, timestamp TIMESTAMPTZ,"
    " created_at TIMESTAMPTZ, turn_key TEXT)": "table conversations .* column timestamp has the type timestamptz",
    "token_buckets (session_id TEXT, full_at INT, at_risk BOOLEAN)": "table token_buckets .* column full_at .* int4",
    "sessions (session_id TEXT)": "no unique constraint",
}


@pytest.fixture(params=["postgres", "pgbouncer"])
def url(request: pytest.FixtureRequest, postgres_url: str) -> str:
    return postgres_url if request.param == "postgres" else str(request.getfixturevalue("pgbouncer"))


@pytest.fixture
async def owner(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that makes another program's tables, which are gone after the test."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.execute(
        "DROP SCHEMA IF EXISTS voice CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA public;"
        + (Path(__file__).parent.parent / "schema.sql").read_text(encoding="utf-8")
    )
    await connection.close()


def within(url: str, parameter: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{parameter}"


async def tables(owner: asyncpg.Connection) -> list[tuple[object, ...]]:
    """All columns, constraints and indexes of the schema public."""
    rows = await owner.fetch(
        "SELECT table_name || '', column_name || '', data_type || '' FROM information_schema.columns"
        " WHERE table_schema = 'public'"
        " UNION ALL SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
        " UNION ALL SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace"
    )
    return sorted(tuple(row) for row in rows)


async def why_not(url: str, **options: float) -> str:
    """Why the storage cannot start, in one line without the name of an exception."""
    with pytest.raises(CannotStart) as caught:
        async with Postgres(url, 2, **{"start_seconds": 0, **options}):
            pass
    told = str(caught.value)
    assert told.isprintable()
    assert "Error" not in told
    assert "hush" not in told
    return told


async def one_turn(storage: Storage) -> None:
    """What every statement of a turn does, to see it work."""
    await storage.admit("s", NOW, 10, create=True)
    await storage.mark_at_risk("s", create=True)
    await storage.add_turn("s", NewTurn("말", "답", "sad", 1))
    await storage.ping()
    admission = await storage.admit("s", NOW, 10)
    assert (admission.at_risk, [turn.user_message for turn in admission.history]) == (True, ["말"])
    assert len(await storage.conversations("s", 10, 2**53)) == 1
    assert await storage.erase_older_than(1) == 0
    await storage.delete_session("s")


# Whose tables


@pytest.mark.parametrize("definition", FOREIGN)
async def test_a_table_of_another_program_is_named_and_not_altered(
    url: str, owner: asyncpg.Connection, definition: str
) -> None:
    await owner.execute(f"CREATE TABLE {definition}")
    if "token" in definition or "conv" in definition:
        await owner.execute("CREATE TABLE sessions (session_id TEXT PRIMARY KEY)")
    before = await tables(owner)
    told = await why_not(url)
    assert WAY_OUT in told
    assert re.search(FOREIGN[definition], told), told
    assert await tables(owner) == before


async def test_a_schema_of_its_own_works_beside_other_programs_tables(url: str, owner: asyncpg.Connection) -> None:
    """The way out that the messages name. The schema is created."""
    await owner.execute(
        "CREATE TABLE sessions (id UUID PRIMARY KEY); CREATE TABLE conversations (id UUID, session_id UUID)"
    )
    before = await tables(owner)
    for _ in range(2):
        async with open_storage(within(url, WAY_OUT)) as storage:
            await one_turn(storage)
    assert await tables(owner) == before
    assert await owner.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'voice'") == 3
    assert await owner.fetchval("SELECT count(*) FROM pg_indexes WHERE schemaname = 'voice'") == 7


async def test_a_schema_that_may_not_be_created_is_named(postgres_url: str, owner: asyncpg.Connection) -> None:
    await owner.execute("DROP ROLE IF EXISTS guest; CREATE ROLE guest LOGIN; GRANT USAGE ON SCHEMA public TO guest")
    try:
        url = within(postgres_url.replace("postgres:@", "guest:hush@"), WAY_OUT)
        assert "cannot create the schema voice: permission denied for database" in await why_not(url)
        assert "cannot create its tables: permission denied for schema public" in await why_not(url.partition("&")[0])
    finally:
        await owner.execute("DROP OWNED BY guest; DROP ROLE guest")


async def test_a_role_that_may_not_write_turns_is_told_so(postgres_url: str, owner: asyncpg.Connection) -> None:
    async with open_storage(postgres_url):
        pass
    await owner.execute(
        "DROP ROLE IF EXISTS reader; CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA public TO reader;"
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"
    )
    try:
        told = await why_not(postgres_url.replace("postgres:@", "reader:@"))
        assert "permission denied for table token_buckets" in told
    finally:
        await owner.execute("DROP OWNED BY reader; DROP ROLE reader")


async def test_tables_that_would_keep_erased_words_are_refused(url: str, owner: asyncpg.Connection) -> None:
    async with open_storage(url):
        pass
    await owner.execute("ALTER TABLE conversations DROP CONSTRAINT conversations_session_id_fkey")
    assert "the table conversations has no foreign key to sessions ON DELETE CASCADE" in await why_not(url)
    await owner.execute("DROP TABLE conversations")


async def test_the_tables_of_an_earlier_version_are_completed(url: str, owner: asyncpg.Connection) -> None:
    async with open_storage(url) as storage:
        await storage.create_session("old")
    await owner.execute("ALTER TABLE conversations DROP turn_key; ALTER TABLE token_buckets DROP at_risk")
    async with open_storage(url) as storage:
        await one_turn(storage)
        assert await storage.conversations("old", 10, 2**53) == []


# Why a connection fails


async def test_what_cannot_be_reached_is_said_in_words(postgres_url: str, pgbouncer: str) -> None:
    assert await why_not("postgresql://u:hush@no-such-host.invalid/d") == "no such host: no-such-host.invalid/d"
    assert "127.0.0.1:9/d refuses connections" in await why_not("postgresql://u:hush@127.0.0.1:9/d")
    assert "(local socket)/d refuses connections" in await why_not("postgresql://u:hush@/d?host=/tmp/no-such-folder")
    assert "offers no TLS" in await why_not(within(pgbouncer, "sslmode=require"))
    assert "no such database" in await why_not(postgres_url.replace("/postgres?", "/nothing?"))
    assert "sslmode" in await why_not(within(postgres_url, "sslmode=always"))
    assert "sslrootcert names a file that is not there: /no/such.crt" in await why_not(
        within(pgbouncer, "sslmode=verify-full&sslrootcert=/no/such.crt")
    )
    assert "role" in await why_not(postgres_url.replace("postgres:@", "nobody-here:hush@"))


@asynccontextmanager
async def refusing(code: str, times: int, then: str) -> AsyncIterator[tuple[str, list[str]]]:
    """The URL of a server that refuses the first connections with an SQLSTATE, and passes the later ones on."""
    told: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)  # asks for TLS
        writer.write(b"N")
        if len(told) < times:
            told.append(code)
            await reader.read(1000)
            body = f"SFATAL\0C{code}\0Mfor a test\0\0".encode()
            writer.write(b"E" + (len(body) + 4).to_bytes(4, "big") + body)
            writer.close()
            return
        other_reader, other_writer = await asyncio.open_unix_connection(then)
        await asyncio.gather(pump(reader, other_writer), pump(other_reader, writer))

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"postgresql://postgres:hush@127.0.0.1:{server.sockets[0].getsockname()[1]}/postgres", told


def socket_of(postgres_url: str) -> str:
    return f"{postgres_url.partition('host=')[2]}/.s.PGSQL.5432"


async def test_a_wrong_password_is_said_in_words() -> None:
    async with refusing("28P01", 10, "") as (url, told):
        place = url.rpartition("@")[2]
        assert await why_not(url) == f"wrong user or password for {place}"
        assert told


@pytest.mark.parametrize("code", ["57P03", "53300", "08006"])
async def test_a_server_that_starts_is_waited_for(
    postgres_url: str, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    """Or that has lent all its connections, or whose pooler does not reach it yet. One line says so."""
    caplog.set_level("INFO", "bemore_voice")
    async with refusing(code, 4, socket_of(postgres_url)) as (url, told):
        async with Postgres(url, 2) as storage:
            await storage.ping()
        assert told == [code] * 4
    assert caplog.text.count("waiting up to 30 s") == 1
    assert "hush" not in caplog.text


async def test_a_server_that_refuses_for_too_long_ends_the_start(postgres_url: str) -> None:
    async with Wire(lambda: asyncio.open_unix_connection(socket_of(postgres_url))) as wire:
        wire.down = True
        told = await why_not(f"postgresql://u:hush@127.0.0.1:{wire.port}/d", start_seconds=0.3)
    assert f"127.0.0.1:{wire.port}/d" in told


async def test_a_server_with_three_connections_serves_all(
    postgres_url: str, owner: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bemore_voice")
    await owner.execute(
        "DROP ROLE IF EXISTS few; CREATE ROLE few LOGIN CONNECTION LIMIT 3; GRANT ALL ON SCHEMA public TO few"
    )
    try:
        async with Postgres(postgres_url.replace("postgres:@", "few:@"), 5) as storage:
            await asyncio.gather(*(storage.admit(f"{number}", NOW, 10, create=True) for number in range(40)))
            lent = await owner.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = 'few'")
            assert 1 <= lent <= 3
            for number in range(40):
                await storage.delete_session(f"{number}")
        assert "fewer than 5 connections" in caplog.text
    finally:
        await owner.execute("DROP OWNED BY few CASCADE; DROP ROLE few")


async def test_a_server_that_has_no_connection_to_lend_is_waited_for(
    postgres_url: str, owner: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bemore_voice")
    await owner.execute(
        "DROP ROLE IF EXISTS few; CREATE ROLE few LOGIN CONNECTION LIMIT 1; GRANT ALL ON SCHEMA public TO few"
    )
    url = postgres_url.replace("postgres:@", "few:@")
    try:
        taken = await asyncpg.connect(url)

        async def start() -> None:
            async with Postgres(url, 5) as storage:
                await storage.ping()

        starting = asyncio.create_task(start())
        await until(lambda: "too many connections" in caplog.text)
        assert not starting.done()
        await taken.close()
        await starting
    finally:
        await owner.execute("DROP OWNED BY few CASCADE; DROP ROLE few")


async def test_a_certificate_is_checked_where_the_url_says_so(tmp_path: Path) -> None:
    key, certificate, other = (tmp_path / name for name in ("key", "certificate", "other"))
    for path in (certificate, other):
        await make_certificate(key, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(other, key)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(b"S")
        with contextlib.suppress(OSError):
            await writer.start_tls(context)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"postgresql://u:hush@127.0.0.1:{port}/d?sslmode=verify-full&sslrootcert={certificate}"
        assert (await why_not(url)).startswith(f"TLS: the certificate of 127.0.0.1:{port}/d is not trusted")


async def make_certificate(key: Path, path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "1"]
    process = await asyncio.create_subprocess_exec(
        *command, "-keyout", key, "-out", path, stderr=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0
