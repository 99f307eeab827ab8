"""Storage in an SQLite file: one connection in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import aiosqlite

from bemore.storage import CREATE_SESSION, SCHEMA, CannotStart, Storage, Unavailable, UnknownSession
from bemore.tables import NEEDED, missing_column

logger = logging.getLogger("bemore_voice")

# SQLite has no ADD COLUMN IF NOT EXISTS, so that apply_schema() looks for the column first.
SCHEMA_SPELLINGS = {
    "BIGSERIAL PRIMARY KEY": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "TIMESTAMPTZ": "TEXT",
    "DEFAULT now()": "DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))",
}
STATEMENT_SPELLINGS = {
    "json_agg": "json_group_array",
    "json_build_array": "json_array",
    "CAST(CAST($1 AS TEXT) AS TIMESTAMPTZ)": "$1",
}
ADD_COLUMN = re.compile(r"ALTER TABLE (\w+) ADD COLUMN IF NOT EXISTS (\w+) (.*)")
READER_PATIENCE_MS = 250  # for another program that reads, before the write-ahead log is emptied


def respelled(sql: str, spellings: Mapping[str, str]) -> str:
    for postgres, sqlite in spellings.items():
        sql = sql.replace(postgres, sqlite)
    return sql


class SQLite(Storage):
    """One connection. A file that is replaced or deleted while the server runs needs a restart."""

    def __init__(self, url: str, timeout: float) -> None:
        self._path = url.removeprefix("sqlite:///")
        self._timeout = timeout  # seconds for one statement
        self._connection: aiosqlite.Connection | None = None
        # Held for each statement, so that none slips into the transaction of another.
        self._lock = asyncio.Lock()
        self.description = f"SQLite {self._path}"

    async def __aenter__(self) -> Self:
        try:
            if self._path != ":memory:":
                # The file is for this user alone. If it cannot be created, SQLite says why below.
                with contextlib.suppress(OSError):
                    os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))
            # A failure inside aiosqlite's thread could outlive the event loop, so that the first try is made here.
            sqlite3.connect(self._path).close()
            self._connection = await aiosqlite.connect(self._path, timeout=self._timeout, isolation_level=None)
            await self._prepare(self._connection)
        except sqlite3.Error as error:
            await self.__aexit__()
            raise CannotStart(f"cannot use {self.description} ({error})") from None
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _prepare(self, db: aiosqlite.Connection) -> None:
        await self._refuse_foreign(db)
        # With synchronous = NORMAL a commit outlives this process at once, and a power failure a moment later.
        for setting in ("journal_mode = WAL", "foreign_keys = ON", "secure_delete = ON", "synchronous = NORMAL"):
            await db.execute(f"PRAGMA {setting}")
        await self._apply_schema(db)
        await self._empty_log()  # a process that was killed may have left there what it erased

    async def _refuse_foreign(self, db: aiosqlite.Connection) -> None:
        """Raise CannotStart if a table belongs to another program, before anything is changed."""
        for table in NEEDED:
            columns = await self._columns(db, table)
            if columns and (missing := missing_column(table, columns)) is not None:
                raise CannotStart(
                    f"{self._path} belongs to another program: its table {table} has no column {missing}."
                    " Name another file"
                )

    async def _apply_schema(self, db: aiosqlite.Connection) -> None:
        """Apply schema.sql in SQLite's spelling, in one transaction."""
        await db.execute("BEGIN IMMEDIATE")
        for statement in respelled(re.sub("--.*", "", SCHEMA.read_text(encoding="utf-8")), SCHEMA_SPELLINGS).split(";"):
            if added := ADD_COLUMN.search(statement):
                table, column, definition = added.groups()
                if column not in await self._columns(db, table):
                    await db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {definition}")
            else:
                await db.execute(statement)
        await db.execute("COMMIT")

    async def _columns(self, db: aiosqlite.Connection, table: str) -> set[str]:
        return {row[0] for row in await db.execute_fetchall("SELECT name FROM pragma_table_info($1)", {"1": table})}

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def _run(self, sql: str, values: Sequence[object], *, create: bool) -> Sequence[Any]:
        # Values are bound by name: Python 3.14 refuses to bind $1 by position.
        named = {str(position): value for position, value in enumerate(values, start=1)}
        sql = respelled(sql, STATEMENT_SPELLINGS)
        try:
            async with asyncio.timeout(self._timeout), self._lock:
                assert self._connection is not None
                if create:
                    return await self._create_and_fetch(self._connection, sql, named)
                return list(await self._connection.execute_fetchall(sql, named))
        except TimeoutError:
            raise Unavailable("database: DATABASE_TIMEOUT_SECONDS passed") from None
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            if name == "SQLITE_CONSTRAINT_FOREIGNKEY":
                raise UnknownSession from None
            raise Unavailable(f"database: {name}") from None

    async def _create_and_fetch(self, db: aiosqlite.Connection, sql: str, named: Mapping[str, object]) -> list[Any]:
        try:
            await db.execute("BEGIN IMMEDIATE")
            await db.execute(CREATE_SESSION, {"1": named["1"]})
            rows = list(await db.execute_fetchall(sql, dict(named)))
            await db.execute("COMMIT")
        except BaseException:
            # The thread runs this after whatever was given up. There may be no transaction to roll back.
            with contextlib.suppress(sqlite3.Error):
                await db.execute("ROLLBACK")
            raise
        return rows

    async def delete_session(self, session_id: str) -> None:
        """Erase a session from the file too: its pages are overwritten, and the write-ahead log is emptied."""
        await super().delete_session(session_id)
        await self._empty_log()

    async def erase_older_than(self, days: float) -> int:
        erased = await super().erase_older_than(days)
        if erased:
            await self._empty_log()
        return erased

    async def _empty_log(self) -> None:
        """Move the write-ahead log into the file and cut it to nothing; another program that reads prevents that."""
        async with self._lock:
            assert self._connection is not None
            await self._connection.execute(f"PRAGMA busy_timeout = {READER_PATIENCE_MS}")
            try:
                ((busy, *_),) = await self._connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error:
                busy = True
            finally:
                await self._connection.execute(f"PRAGMA busy_timeout = {self._timeout * 1000:.0f}")
        if busy:
            logger.warning(
                "%s: %s-wal cannot be emptied while another program reads the file; it may hold what was erased"
                " until the next deletion or the end of this process",
                self.description,
                Path(self._path).name,
            )
