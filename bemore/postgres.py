"""Storage in Postgres; imported for a Postgres URL alone, since asyncpg takes 0.1 s and 5 MB."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg

from bemore.storage import SCHEMA, NotPermitted, Storage, Unavailable, UnknownSession

CLOSE_SECONDS = 2  # for the connections of the pool to say goodbye

# Any constant will do: replicas that start together on an empty database take turns by it.
SCHEMA_LOCK = 0x62656D6F7265
# What a role without the right to create tables must find in place.
TABLES_IN_PLACE = """
SELECT session_id FROM sessions LIMIT 0;
SELECT id, session_id, user_message, ai_response, emotion, timestamp, created_at FROM conversations LIMIT 0;
SELECT session_id, full_at, at_risk FROM token_buckets LIMIT 0;
"""
FAULTS = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)


class Postgres(Storage):
    """A pool of 5 to 20 connections, directly or through a pooler in transaction mode."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout  # seconds, for one statement
        self._pool: asyncpg.Pool | None = None
        parts = urlsplit(url)  # what stands before an @ is nobody's business
        self.where = f"Postgres {parts.netloc.rpartition('@')[2] or '(local socket)'}{parts.path}"

    async def __aenter__(self) -> Self:
        try:
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=5,
                max_size=20,
                timeout=self._timeout,
                # A pooler in transaction mode may run the next statement on another server connection, which
                # does not know what was prepared on this one.
                statement_cache_size=0,
                reset=leave_as_it_is,
            )
            await self._apply_schema()
        except (*FAULTS, ValueError) as error:
            await self.__aexit__()
            raise Unavailable(type(error).__name__) from None
        return self

    async def _apply_schema(self) -> None:
        assert self._pool is not None
        schema = SCHEMA.read_text(encoding="utf-8")
        try:
            # Without arguments it is one simple query, and so one transaction, which the lock lasts for.
            await self._pool.execute(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK});\n{schema}")
        except asyncpg.InsufficientPrivilegeError:
            await self._pool.execute(TABLES_IN_PLACE)

    async def __aexit__(self, *_: object) -> None:
        if self._pool is not None:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._pool.close()
            except TimeoutError:
                self._pool.terminate()
            self._pool = None

    async def fetch(self, sql: str, *values: object) -> Sequence[Any]:
        assert self._pool is not None
        try:
            async with asyncio.timeout(self._timeout), self._pool.acquire() as connection:
                try:
                    return await connection.fetch(sql, *values)
                except asyncio.CancelledError:
                    connection.terminate()  # its release would wait for the server to confirm the cancellation
                    raise
        except asyncpg.ForeignKeyViolationError:
            raise UnknownSession from None
        except (asyncpg.InsufficientPrivilegeError, asyncpg.NotNullViolationError) as error:
            raise NotPermitted(f"database: {type(error).__name__}") from None
        except FAULTS as error:
            raise Unavailable(f"database: {type(error).__name__}") from None


async def leave_as_it_is(_: object) -> None:
    """Give a connection back to the pool without a reset: no statement here changes its state."""
