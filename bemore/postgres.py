"""Storage in Postgres; imported for a Postgres URL alone, since asyncpg takes 0.1 s and 5 MB."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg

from bemore.storage import (
    CREATE_SESSION,
    ERASE_OLD,
    OF_SESSION,
    SCHEMA,
    CannotStart,
    NotPermitted,
    Storage,
    Unavailable,
    UnknownSession,
)

logger = logging.getLogger("bemore_voice")

MIN_CONNECTIONS, MAX_CONNECTIONS = 5, 20
# An idle connection is replaced after this, before a NAT or a load balancer drops it without a word.
IDLE_SECONDS = 30
CLOSE_SECONDS = 2

# Any constants will do. Replicas that start together on an empty database, or erase old sessions, take turns by them.
SCHEMA_LOCK, ERASE_LOCK = 0x62656D6F7265, 0x62656D6F7266
FAULTS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)


def creating(sql: str) -> str:
    """Return the statement that creates session $1 first. `count` makes Postgres run that part before the rest."""
    created = "FROM (SELECT count(*) FROM created) AS created"
    return f"WITH created AS ({CREATE_SESSION} RETURNING 1) {sql.replace(OF_SESSION, created)}"


def one_at_a_time(sql: str) -> str:
    """Return the DELETE that does nothing while another replica runs it; the lock ends with its transaction."""
    return sql.replace("WHERE", f"WHERE (SELECT pg_try_advisory_xact_lock({ERASE_LOCK})) AND", 1)


STATEMENTS = {ERASE_OLD: one_at_a_time(ERASE_OLD)}


class Postgres(Storage):
    """A pool of connections.

    Statements are not kept prepared, since a pooler in transaction mode may run the next one on another connection of
    its own.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout  # seconds for one statement
        self._pool: asyncpg.Pool | None = None
        self._releasing: set[asyncio.Task[None]] = set()
        parts = urlsplit(url)
        self.description = f"Postgres {parts.netloc.rpartition('@')[2] or '(local socket)'}{parts.path}"

    async def __aenter__(self) -> Self:
        try:
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=MIN_CONNECTIONS,
                max_size=MAX_CONNECTIONS,
                max_inactive_connection_lifetime=IDLE_SECONDS,
                reset=keep_as_it_is,
                timeout=self._timeout,
                command_timeout=self._timeout,
                statement_cache_size=0,
            )
            await self._apply_schema()
        except (*FAULTS, ValueError) as error:
            await self.__aexit__()
            raise CannotStart(f"cannot use {self.description} ({type(error).__name__})") from None
        return self

    async def _apply_schema(self) -> None:
        """Apply schema.sql where something is missing: it locks tables, which other replicas may be using."""
        with contextlib.suppress(Unavailable):
            await self.ping()
            return
        schema = SCHEMA.read_text(encoding="utf-8")
        assert self._pool is not None
        async with self._pool.acquire() as connection:
            # Without arguments it is one simple query, and so one transaction, which the lock lasts for.
            await connection.execute(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK});\n{schema}", timeout=600)

    async def __aexit__(self, *_: object) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await pool.close()
            except FAULTS:
                pool.terminate()

    async def _run(self, sql: str, values: Sequence[object], *, create: bool) -> Sequence[Any]:
        sql = creating(sql) if create else STATEMENTS.get(sql, sql)
        assert self._pool is not None
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._pool.acquire()
                try:
                    rows: Sequence[Any] = await connection.fetch(sql, *values)
                finally:
                    self._release_later(connection)
                return rows
        except asyncpg.ForeignKeyViolationError:
            raise UnknownSession from None
        except (asyncpg.InsufficientPrivilegeError, asyncpg.NotNullViolationError) as error:
            raise NotPermitted(f"database: {type(error).__name__}") from None
        except FAULTS as error:
            if isinstance(error, TimeoutError) and self._pool is not None:
                # The path to the server may be gone, and all connections with it.
                await self._pool.expire_connections()
            raise Unavailable(f"database: {type(error).__name__}") from None

    def _release_later(self, connection: Any) -> None:
        """Return a connection to the pool, which first waits for the end of a statement that was given up."""
        assert self._pool is not None
        task = asyncio.ensure_future(self._pool.release(connection))
        self._releasing.add(task)
        task.add_done_callback(self._released)

    def _released(self, task: asyncio.Task[None]) -> None:
        self._releasing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("%s: a connection was closed (%s)", self.description, type(error).__name__)


async def keep_as_it_is(_: object) -> None:
    """Spare the round trip by which asyncpg resets a connection: the statements above change no setting."""
