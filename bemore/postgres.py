"""Storage in Postgres; imported for a Postgres URL alone, since asyncpg takes 0.1 s and 5 MB."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any, Self

import asyncpg

from bemore.database_url import DatabaseUrl, parse_database_url
from bemore.postgres_start import FAULTS, is_temporary, prepare_tables, qualified, reason
from bemore.storage import (
    CREATE_SESSION,
    ERASE_OLD,
    OF_SESSION,
    CannotStart,
    NotPermitted,
    Storage,
    Unavailable,
    UnknownSession,
)

logger = logging.getLogger("bemore_voice")

MIN_CONNECTIONS, MAX_CONNECTIONS = 5, 20
# A NAT or a load balancer may have dropped a connection that was idle for longer. It has to answer a probe first.
IDLE_SECONDS, PROBE_SECONDS = 30, 0.5
CROWD_SECONDS = 0.25  # that a statement waits before the pool grows for it
CACHED_STATEMENTS = 50  # more than there are
CLOSE_SECONDS = 2
START_SECONDS, RETRY_SECONDS = 30, 0.25  # for a server that starts at the same moment, or wakes
BUSY_SECONDS = 0.02  # between two tries to get a connection from a server that lends only a few

# Any constant will do. Replicas that erase old sessions take turns by it.
ERASE_LOCK = 0x62656D6F7266


def creating(sql: str) -> str:
    """Return the statement that creates session $1 first. `count` makes Postgres run that part before the rest."""
    created = "FROM (SELECT count(*) FROM created) AS created"
    return f"WITH created AS ({CREATE_SESSION} RETURNING 1) {sql.replace(OF_SESSION, created)}"


def one_at_a_time(sql: str) -> str:
    """Return the DELETE that does nothing while another replica runs it; the lock ends with its transaction."""
    return sql.replace("WHERE", f"WHERE (SELECT pg_try_advisory_xact_lock({ERASE_LOCK})) AND", 1)


class Connection(asyncpg.Connection):
    """A connection that knows when it was last used, in time.monotonic()."""

    used_at = 0.0


class DroppedConnection(Exception):
    """An idle connection did not answer a probe."""


async def note_use(connection: Any) -> None:
    """Take the place of asyncpg's reset, which costs a round trip: no statement changes a setting."""
    connection.used_at = time.monotonic()


class Postgres(Storage):
    """A pool of connections.

    Statements are kept prepared if this is Postgres itself. A pooler in transaction mode may run the next statement on
    another connection of its own, where a prepared one is missing, or where its name means something else.
    """

    def __init__(self, url: str, timeout: float, start_seconds: float = START_SECONDS) -> None:
        self._url = url
        self._timeout = timeout  # seconds for one statement
        self._start_seconds = start_seconds
        self._schema = ""
        self._pool: asyncpg.Pool | None = None
        self._doubted_at = 0.0  # connections that were last used before this moment have to answer a probe
        self._cached_statements = 0
        self._few = asyncio.Semaphore(MIN_CONNECTIONS)
        self._releasing: set[asyncio.Task[None]] = set()
        self._spelled: dict[tuple[str, bool], str] = {}
        self.description = "Postgres"

    async def __aenter__(self) -> Self:
        url = parse_database_url(self._url)
        self.description, self._schema = f"Postgres {url.place}", url.schema
        if url.unknown:
            logger.warning("DATABASE_URL: unknown parameters are passed over: %s", " ".join(url.unknown))
        self._pool = await self._connect(url)
        try:
            async with self._pool.acquire() as connection:
                await prepare_tables(connection, url.schema)
        except FAULTS as error:
            await self.__aexit__()
            raise CannotStart(reason(error, url.place)) from None
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _connect(self, url: DatabaseUrl) -> asyncpg.Pool:
        """Open the pool, and wait for a server that starts or has no connection to lend."""
        deadline = time.monotonic() + self._start_seconds
        waiting = False
        while True:
            try:
                return await self._open_pool(url.for_asyncpg)
            except (*FAULTS, ValueError) as error:
                why = reason(error, url.place)
                if not is_temporary(error) or time.monotonic() >= deadline:
                    raise CannotStart(why) from None
            if not waiting:
                logger.info("DATABASE_URL: waiting up to %.0f s: %s", self._start_seconds, why)
                waiting = True
            await asyncio.sleep(RETRY_SECONDS)

    async def _open_pool(self, dsn: str) -> asyncpg.Pool:
        self._cached_statements = CACHED_STATEMENTS if await self._is_direct(dsn) else 0
        try:
            return await self._pool_of(dsn, MIN_CONNECTIONS)
        except asyncpg.PostgresError:
            pool = await self._pool_of(dsn, 1)
        logger.info("%s: lends fewer than %d connections at present", self.description, MIN_CONNECTIONS)
        return pool

    async def _is_direct(self, dsn: str) -> bool:
        """Tell whether this is Postgres itself: a pooler gives its clients process ids of its own invention."""
        connection = await asyncpg.connect(
            dsn, timeout=self._timeout, command_timeout=self._timeout, statement_cache_size=0
        )
        try:
            return bool(await connection.fetchval("SELECT pg_backend_pid()") == connection.get_server_pid())
        finally:
            await connection.close(timeout=CLOSE_SECONDS)

    async def _pool_of(self, dsn: str, least: int) -> asyncpg.Pool:
        return await asyncpg.create_pool(
            dsn,
            min_size=least,
            max_size=MAX_CONNECTIONS,
            max_inactive_connection_lifetime=IDLE_SECONDS,
            connection_class=Connection,
            init=note_use,
            setup=self._probe,
            reset=note_use,
            timeout=self._timeout,
            command_timeout=self._timeout,
            statement_cache_size=self._cached_statements,
            max_cached_statement_lifetime=0,
        )

    async def __aexit__(self, *_: object) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await pool.close()
            except FAULTS:
                pool.terminate()

    async def _run(self, sql: str, values: Sequence[object], *, create: bool) -> Sequence[Any]:
        assert self._pool is not None
        try:
            async with asyncio.timeout(self._timeout):
                entered = await self._enter()
                try:
                    return await self._fetch(self._pool, self._spell(sql, create), values)
                finally:
                    if entered:
                        self._few.release()
        except asyncpg.ForeignKeyViolationError:
            raise UnknownSession from None
        except (asyncpg.InsufficientPrivilegeError, asyncpg.NotNullViolationError) as error:
            raise NotPermitted(f"database: {type(error).__name__}") from None
        except FAULTS as error:
            if isinstance(error, TimeoutError):
                # The path to the server may be gone, and all connections with it.
                self._doubted_at = time.monotonic()
            raise Unavailable(f"database: {type(error).__name__}") from None

    async def _enter(self) -> bool:
        """Wait for a moment while as many statements run as the pool has connections at least.

        In a burst most of them take less time than opening a connection, which asyncpg would do for each at once.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CROWD_SECONDS):
                return await self._few.acquire()
        return False

    async def _fetch(self, pool: asyncpg.Pool, sql: str, values: Sequence[object]) -> Sequence[Any]:
        connection = await self._acquire(pool)
        try:
            rows: Sequence[Any] = await connection.fetch(sql, *values)
        except BaseException:
            self._release_later(connection)
            raise
        await pool.release(connection)
        return rows

    async def _acquire(self, pool: asyncpg.Pool) -> Any:
        while True:
            try:
                return await pool.acquire()
            except DroppedConnection:
                continue
            except asyncpg.PostgresError:
                if not pool.get_size():
                    raise
            # The server lends no more connections than these: wait for one of them.
            await asyncio.sleep(BUSY_SECONDS)

    async def _probe(self, connection: Any) -> None:
        """Raise DroppedConnection if a connection that is in doubt does not answer."""
        if connection.used_at > max(self._doubted_at, time.monotonic() - IDLE_SECONDS):
            return
        try:
            await connection.execute("SELECT 1", timeout=PROBE_SECONDS)
        except FAULTS:
            connection.terminate()
            raise DroppedConnection from None

    def _spell(self, sql: str, create: bool) -> str:
        if (sql, create) not in self._spelled:
            spelled = creating(sql) if create else one_at_a_time(sql) if sql == ERASE_OLD else sql
            self._spelled[sql, create] = qualified(spelled, self._schema)
        return self._spelled[sql, create]

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
