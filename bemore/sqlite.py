"""Storage in an SQLite file: one connection, in aiosqlite's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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


@cache
def spelled(sql: str) -> str:
    """Return a statement in SQLite's spelling."""
    return respelled(sql, STATEMENT_SPELLINGS)


def respelled(sql: str, spellings: Mapping[str, str]) -> str:
    for postgres, sqlite in spellings.items():
        sql = sql.replace(postgres, sqlite)
    return sql


# Run in the thread of the connection


def prepare(db: sqlite3.Connection, path: str) -> None:
    refuse_foreign(db, path)
    # With synchronous = NORMAL a commit outlives this process at once, and a power failure a moment later.
    for setting in ("journal_mode = WAL", "foreign_keys = ON", "secure_delete = ON", "synchronous = NORMAL"):
        db.execute(f"PRAGMA {setting}")
    apply_schema(db)


def columns_of(db: sqlite3.Connection, table: str) -> set[str]:
    return {row[0] for row in db.execute("SELECT name FROM pragma_table_info($table)", {"table": table})}


def refuse_foreign(db: sqlite3.Connection, path: str) -> None:
    """Raise CannotStart if a table belongs to another program, before anything is changed."""
    for table in NEEDED:
        columns = columns_of(db, table)
        if columns and (missing := missing_column(table, columns)) is not None:
            raise CannotStart(
                f"{path} belongs to another program: its table {table} has no column {missing}. Name another file"
            )


def apply_schema(db: sqlite3.Connection) -> None:
    """Apply schema.sql in SQLite's spelling, in one transaction."""
    schema = re.sub("--.*", "", SCHEMA.read_text(encoding="utf-8"))
    with transaction(db):
        for statement in respelled(schema, SCHEMA_SPELLINGS).split(";"):
            if added := ADD_COLUMN.search(statement):
                table, column, definition = added.groups()
                if column not in columns_of(db, table):
                    db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {definition}")
            else:
                db.execute(statement)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk, for one, ends it
            db.execute("ROLLBACK")
        raise


@dataclass(frozen=True, slots=True)
class Job:
    """A statement that waits for the thread. One that was given up is not begun."""

    sql: str
    named: Mapping[str, object]
    create: bool
    done: asyncio.Future[list[Any]]


def run_all(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[list[Any] | Exception]:
    """Run statements one after another, each for itself; return the rows of each, or what it failed by."""
    outcomes: list[list[Any] | Exception] = []
    for job in jobs:
        try:
            outcomes.append([] if job.done.cancelled() else run(db, job))
        except Exception as error:
            outcomes.append(error)
    return outcomes


def run(db: sqlite3.Connection, job: Job) -> list[Any]:
    if not job.create:
        return db.execute(job.sql, job.named).fetchall()
    with transaction(db):
        db.execute(CREATE_SESSION, {"1": job.named["1"]})
        return db.execute(job.sql, job.named).fetchall()


def empty_log(db: sqlite3.Connection, timeout: float) -> bool:
    """Move the write-ahead log into the file and cut it to nothing; return False if another program prevents that."""
    db.execute(f"PRAGMA busy_timeout = {READER_PATIENCE_MS}")
    try:
        ((busy, *_),) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error:
        return False
    finally:
        db.execute(f"PRAGMA busy_timeout = {timeout * 1000:.0f}")
    return not busy


class SQLite(Storage):
    """One connection. A file that is replaced or deleted while the server runs needs a restart."""

    def __init__(self, url: str, timeout: float) -> None:
        self._path = url.removeprefix("sqlite:///")
        self._timeout = timeout  # seconds for one statement
        self._db: sqlite3.Connection | None = None
        self._thread: aiosqlite.Connection | None = None
        self._waiting: list[Job] = []
        self._worker: asyncio.Task[None] | None = None
        self.description = f"SQLite {self._path}"

    async def __aenter__(self) -> Self:
        try:
            if self._path != ":memory:":
                # The file is for this user alone. If it cannot be created, SQLite says why below.
                with contextlib.suppress(OSError):
                    os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))
            # If aiosqlite cannot connect, its thread outlives the event loop, so that the first try is made here.
            sqlite3.connect(self._path).close()
            self._thread = aiosqlite.Connection(self._connect, iter_chunk_size=64)
            await self._thread
            await self._call(prepare, self._path)
            await self._empty_log()  # a process that was killed may have left there what it erased
        except sqlite3.Error as error:
            await self.__aexit__()
            raise CannotStart(f"cannot use {self.description} ({error})") from None
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def _connect(self) -> sqlite3.Connection:
        self._db = sqlite3.connect(self._path, timeout=self._timeout, isolation_level=None)
        return self._db

    async def __aexit__(self, *_: object) -> None:
        if self._thread is not None:
            await self._thread.close()
            self._thread = None

    async def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call a function in the connection's thread. aiosqlite's own methods take a hop for each statement."""
        assert self._thread is not None
        return await self._thread._execute(function, self._db, *arguments)  # type: ignore[no-untyped-call]

    async def _run(self, sql: str, values: Sequence[object], *, create: bool) -> Sequence[Any]:
        # Values are bound by name: Python 3.14 refuses to bind $1 by position.
        named = {str(position): value for position, value in enumerate(values, start=1)}
        job = Job(spelled(sql), named, create, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout(self._timeout):
                return await job.done
        except TimeoutError:
            raise Unavailable("database: DATABASE_TIMEOUT_SECONDS passed") from None
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            if name == "SQLITE_CONSTRAINT_FOREIGNKEY":
                raise UnknownSession from None
            raise Unavailable(f"database: {name}") from None

    async def _work(self) -> None:
        """Hand all statements that wait to the thread in one call, until none waits.

        A call for each would compete with the event loop for the interpreter's lock each time, which fifty people who
        speak in one moment would notice.
        """
        try:
            while self._waiting:
                jobs, self._waiting = self._waiting, []
                for job, outcome in zip(jobs, await self._call(run_all, jobs), strict=True):
                    if not job.done.done() and isinstance(outcome, Exception):
                        job.done.set_exception(outcome)
                    elif not job.done.done():
                        job.done.set_result(outcome)
        finally:
            self._worker = None

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
        if not await self._call(empty_log, self._timeout):
            logger.warning(
                "%s: %s-wal cannot be emptied while another program reads the file; it may hold what was erased"
                " until the next deletion or the end of this process",
                self.description,
                Path(self._path).name,
            )
