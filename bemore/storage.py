"""What the server keeps: the statements, their errors, and SQLite; postgres.py is the other engine."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import os
import re
import secrets
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiosqlite

from bemore.counsellor import PastTurn

logger = logging.getLogger("bemore_voice")

SCHEMA = Path(__file__).parent.parent / "schema.sql"
HISTORY_TURNS = 10
CLOCK_SKEW_US = 10_000_000  # between replicas; a bucket that is full later than that allows was left by a clock
EMPTYING_SECONDS = 1  # between two tries to empty SQLite's log that another program reads

# Errors


class StorageError(Exception):
    """An operation that could not be done."""


class UnknownSession(StorageError):
    """There is no such session, or it was deleted meanwhile."""


class NoToken(StorageError):
    """The session's bucket is empty, for `retry_after_ms` from now on."""

    def __init__(self, retry_after_ms: int) -> None:
        super().__init__(retry_after_ms)
        self.retry_after_ms = retry_after_ms


class Unavailable(StorageError):
    """The database did not answer, or not as it should; `cause` never holds what anyone said, or a password."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class NotPermitted(Unavailable):
    """The database does not let this server do that, such as add to a table that another service owns."""


# Statements, in Postgres' spelling, which SQLite takes too

CREATE_SESSION = "INSERT INTO sessions (session_id) VALUES ($1) ON CONFLICT (session_id) DO NOTHING"

# All that a request needs, in one round trip: a token, the mark and the last turns.
# The token bucket is told by when it is full again: a token moves that moment on by the time in which one refills, and
# is refused where the moment would lie further ahead than an empty bucket needs. One statement, so that two replicas
# cannot take the same token. $2 now, $3 one token's refill, $4 a whole bucket's, all in microseconds; $5 the mark.
# From sessions, so that an unknown one brings no row rather than an error that Postgres would log with its id.
ADMIT = """
INSERT INTO token_buckets (session_id, full_at, at_risk)
SELECT session_id, CAST($2 AS BIGINT) + CAST($3 AS BIGINT), CAST($5 AS BOOLEAN)
FROM sessions WHERE session_id = CAST($1 AS TEXT)
ON CONFLICT (session_id) DO UPDATE SET full_at = CAST($3 AS BIGINT)
    + CASE WHEN token_buckets.full_at > CAST($2 AS BIGINT) THEN token_buckets.full_at ELSE CAST($2 AS BIGINT) END,
    at_risk = token_buckets.at_risk OR excluded.at_risk
WHERE token_buckets.full_at + CAST($3 AS BIGINT) <= CAST($2 AS BIGINT) + CAST($4 AS BIGINT)
RETURNING at_risk, (
    SELECT json_agg(json_build_array(id, user_message, ai_response)) FROM (
        SELECT id, user_message, ai_response FROM conversations
        WHERE session_id = CAST($1 AS TEXT) ORDER BY id DESC LIMIT CAST($6 AS BIGINT)
    ) AS last
)
"""
FULL_AT = "SELECT full_at FROM token_buckets WHERE session_id = CAST($1 AS TEXT)"
EMPTY_BUCKET = "UPDATE token_buckets SET full_at = $2 WHERE session_id = $1 AND full_at > $2"

# Kept with the bucket, which is there or is made full.
MARK_AT_RISK = """
INSERT INTO token_buckets (session_id, full_at, at_risk)
SELECT session_id, 0, TRUE FROM sessions WHERE session_id = CAST($1 AS TEXT)
ON CONFLICT (session_id) DO UPDATE SET at_risk = TRUE
"""

# Safe to repeat, and to repeat while the last try still waits for a lock: the turn's key is stored once in a session.
ADD_TURN = """
INSERT INTO conversations (session_id, turn_key, user_message, ai_response, emotion, timestamp)
SELECT session_id, CAST($2 AS TEXT), CAST($3 AS TEXT), CAST($4 AS TEXT), CAST($5 AS TEXT), CAST($6 AS BIGINT)
FROM sessions WHERE session_id = CAST($1 AS TEXT)
ON CONFLICT (session_id, turn_key) DO NOTHING RETURNING id
"""
FIND_TURN = "SELECT id FROM conversations WHERE session_id = CAST($1 AS TEXT) AND turn_key = CAST($2 AS TEXT)"
WITHDRAW_TURN = "DELETE FROM conversations WHERE session_id = CAST($1 AS TEXT) AND turn_key = CAST($2 AS TEXT)"

COLUMNS = ("id", "session_id", "user_message", "ai_response", "emotion", "timestamp", "created_at")
# One row at least where there is such a session, its columns empty where nothing was said.
CONVERSATIONS = f"""
SELECT {", ".join(f"said.{column}" for column in COLUMNS)} FROM sessions
LEFT JOIN conversations AS said ON said.session_id = sessions.session_id AND said.id < CAST($2 AS BIGINT)
WHERE sessions.session_id = CAST($1 AS TEXT) ORDER BY said.id DESC LIMIT CAST($3 AS BIGINT)
"""
DELETE_SESSION = "DELETE FROM sessions WHERE session_id = $1 RETURNING session_id"  # the rest goes by its foreign keys

NOBODY = ""  # no session has this id


@dataclass(frozen=True, slots=True)
class NewTurn:
    """A turn to be stored: what was said, as it was shown; `timestamp` by the client's clock, in milliseconds."""

    user_message: str
    ai_response: str
    emotion: str | None
    timestamp: int
    key: str = field(default_factory=lambda: secrets.token_hex(16))  # it is stored once, however often that is tried


@dataclass(frozen=True, slots=True)
class Admission:
    """What a session may go on with: whether it is at risk, and its last turns, the oldest first."""

    at_risk: bool
    history: list[PastTurn]


class Storage(ABC):
    """The operations, each of one statement; an engine adds how it connects and how it runs one.

    Every operation raises UnknownSession where the session does not exist, and Unavailable where the database does not
    answer within its time limit. What was given up is cancelled, or never begun; whether it was done nobody can say.
    """

    where: str  # for people to read; never holds a password

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Connect and apply schema.sql; raise Unavailable where that cannot be done."""

    @abstractmethod
    async def __aexit__(self, *_: object) -> None: ...

    @abstractmethod
    async def fetch(self, sql: str, *values: object) -> Sequence[Any]:
        """Run one statement and return its rows."""

    async def settled(self) -> None:  # noqa: B027 - where statements run one after another there is nothing to wait for
        """Wait until every statement that was given up is over; raise Unavailable where that takes too long."""

    async def ping(self) -> None:
        """Try what a turn needs, for nobody."""
        with contextlib.suppress(UnknownSession):
            await self.admit(NOBODY, 0, 1)
        with contextlib.suppress(UnknownSession):
            await self.add_turn(NOBODY, NewTurn("", "", None, 0))

    async def create_session(self, session_id: str) -> None:
        """Create a session where there is none yet; raise NotPermitted where only another service may."""
        await self.fetch(CREATE_SESSION, session_id)

    async def admit(self, session_id: str, now_us: int, per_minute: int, *, at_risk: bool = False) -> Admission:
        """Take one of the session's tokens, or raise NoToken; `at_risk` marks it for as long as it lasts."""
        refill = 60_000_000 // per_minute
        bucket = refill * per_minute
        taken = await self.fetch(ADMIT, session_id, now_us, refill, bucket, at_risk, HISTORY_TURNS)
        if not taken:
            full_at = await self._full_at(session_id, now_us + bucket)
            raise NoToken(max(1, -(-(full_at + refill - bucket - now_us) // 1000)))
        ((marked, last),) = taken
        return Admission(bool(marked), [PastTurn(*said) for said in sorted(json.loads(last or "[]"))])

    async def _full_at(self, session_id: str, latest: int) -> int:
        """Return when the bucket is full; one that says later than any can was left by a clock, and counts as empty."""
        if not (rows := await self.fetch(FULL_AT, session_id)):
            raise UnknownSession
        full_at = int(rows[0][0])
        if full_at <= latest + CLOCK_SKEW_US:
            return full_at
        await self.fetch(EMPTY_BUCKET, session_id, latest)
        return latest

    async def mark_at_risk(self, session_id: str) -> None:
        """Note, for as long as the session lasts, that it holds a sign of danger."""
        await self.fetch(MARK_AT_RISK, session_id)

    async def add_turn(self, session_id: str, turn: NewTurn) -> None:
        """Store a turn once, however often this is called."""
        values = (turn.user_message, turn.ai_response, turn.emotion, turn.timestamp)
        stored = await self.fetch(ADD_TURN, session_id, turn.key, *values)
        if not (stored or await self.fetch(FIND_TURN, session_id, turn.key)):
            raise UnknownSession

    async def withdraw_turn(self, session_id: str, key: str) -> None:
        """Remove a turn of which the person was told that it failed, where it was stored after all."""
        await self.fetch(WITHDRAW_TURN, session_id, key)
        await self.settled()  # by then what was given up has stored it, or never will
        await self.fetch(WITHDRAW_TURN, session_id, key)

    async def conversations(self, session_id: str, limit: int, before: int) -> list[dict[str, object]]:
        """Return up to `limit` turns with ids under `before`, the newest of them, oldest first, by column."""
        rows = await self.fetch(CONVERSATIONS, session_id, before, limit)
        if not rows:
            raise UnknownSession
        turns = [dict(zip(COLUMNS, map(json_value, row), strict=True)) for row in reversed(rows)]
        return [turn for turn in turns if turn["id"] is not None]

    async def delete_session(self, session_id: str) -> None:
        """Erase a session with all that it said; raise NotPermitted as above."""
        if not await self.fetch(DELETE_SESSION, session_id):
            raise UnknownSession


def json_value(value: object) -> object:
    """Return a column's value as JSON takes it; Postgres gives a moment where SQLite gives its text."""
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return value


# SQLite

# The smallest honest translation of schema.sql; SQLite knows no ADD COLUMN IF NOT EXISTS and must be asked first.
SCHEMA_SPELLINGS = {
    "BIGSERIAL PRIMARY KEY": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "TIMESTAMPTZ": "TEXT",
    "DEFAULT now()": "DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))",
}
STATEMENT_SPELLINGS = {"json_agg": "json_group_array", "json_build_array": "json_array"}
# After which the file is opened again: it may have been replaced or mended in place.
OPENED_AGAIN = ("SQLITE_READONLY", "SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CANTOPEN", "SQLITE_IOERR")
ADD_COLUMN = re.compile(r"ALTER TABLE (\w+) ADD COLUMN IF NOT EXISTS (\w+) (.*)")


def respelled(sql: str, spellings: Mapping[str, str]) -> str:
    for postgres, sqlite in spellings.items():
        sql = sql.replace(postgres, sqlite)
    return sql


def apply_schema(connection: sqlite3.Connection, schema: str) -> None:
    """Apply schema.sql in SQLite's words, statement by statement."""
    for statement in respelled(re.sub("--.*", "", schema), SCHEMA_SPELLINGS).split(";"):
        if added := ADD_COLUMN.search(statement):
            table, column, definition = added.groups()
            if (column,) not in connection.execute(f"SELECT name FROM pragma_table_info('{table}')").fetchall():
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {definition}")
        else:
            connection.execute(statement)


@dataclass(slots=True, eq=False)
class Job:
    """A statement that waits for SQLite's thread; one that is given up before its turn is not begun."""

    sql: str
    values: Mapping[str, object]
    deadline: float  # by time.monotonic()
    done: asyncio.Future[list[Any]]
    given_up: bool = False
    rows: list[Any] = field(default_factory=list)
    error: Exception | None = None

    @property
    def reads(self) -> bool:
        return self.sql.lstrip().startswith("SELECT")

    @property
    def may_run_again(self) -> bool:
        """Whether only another program's lock was in the way, and there is time left."""
        locked = getattr(self.error, "sqlite_errorname", "") == "SQLITE_BUSY"
        return locked and not self.given_up and time.monotonic() < self.deadline

    def finish(self) -> None:
        if not self.done.done() and self.error is not None:
            self.done.set_exception(self.error)
        elif not self.done.done():
            self.done.set_result(self.rows)


def run_together(connection: sqlite3.Connection, jobs: Sequence[Job]) -> None:
    """Run statements in one transaction; what fails one of them leaves the others, what fails all leaves none done."""
    patience = max(0.0, min(job.deadline for job in jobs) - time.monotonic())
    connection.execute(f"PRAGMA busy_timeout = {patience * 1000:.0f}")
    writes = not all(job.reads for job in jobs)
    try:
        if writes:
            connection.execute("BEGIN IMMEDIATE")
        for job in jobs:
            run_one(connection, job)
            if writes and not connection.in_transaction:  # a full disk, for one, ends it
                raise job.error or sqlite3.OperationalError
        if writes:
            connection.execute("COMMIT")
    except Exception as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        for job in jobs:
            job.rows, job.error = [], error


def run_one(connection: sqlite3.Connection, job: Job) -> None:
    job.rows, job.error = [], None
    if job.given_up:
        return
    try:
        job.rows = connection.execute(job.sql, job.values).fetchall()
    except Exception as error:  # a mistake of ours too is its own statement's alone
        job.error = error


class Thread(aiosqlite.Connection):
    """SQLite's own thread, to which more than one statement may be handed at a time."""

    async def run(self, function: Callable[..., Any], *arguments: object) -> Any:
        return await self._execute(function, self._conn, *arguments)  # type: ignore[no-untyped-call]


class SQLite(Storage):
    """One connection, in a thread of its own; what many ask in one moment shares a hop to it and a commit."""

    def __init__(self, url: str, timeout: float) -> None:
        self._path = url.removeprefix("sqlite:///")
        self._timeout = timeout  # seconds, for one statement
        self._thread: Thread | None = None
        self._waiting: list[Job] = []
        self._worker: asyncio.Task[None] | None = None
        self._emptying: asyncio.Task[None] | None = None
        self._files: tuple[int, ...] | None = None  # what was opened; none where it is to be opened again
        self._probes = 0
        self.where = f"SQLite {self._path}"

    async def __aenter__(self) -> Self:
        try:
            if self._path != ":memory:":
                with contextlib.suppress(OSError):  # it is there, or SQLite says below what is wrong
                    os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))  # for this user's eyes only
            await self._open()
        except sqlite3.Error as error:
            await self.__aexit__()
            raise Unavailable(str(error)) from None
        return self

    async def _open(self) -> None:
        """Open the file, whole or not at all: without foreign keys nothing is erased with its session."""
        sqlite3.connect(self._path).close()  # where it cannot be opened, aiosqlite's thread outlives the loop
        thread = Thread(lambda: sqlite3.connect(self._path, timeout=self._timeout, isolation_level=None), 64)
        await thread
        try:
            await thread.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON; PRAGMA secure_delete = ON;"
                "PRAGMA synchronous = NORMAL"  # a commit outlives this process at once, and the machine a moment later
            )
            await thread.run(apply_schema, SCHEMA.read_text(encoding="utf-8"))
        except sqlite3.Error:
            await thread.close()
            raise
        self._thread, self._files = thread, self._files_in_place()
        await self._empty_log()  # a process that was killed may have left there what it erased

    async def __aexit__(self, *_: object) -> None:
        if self._emptying is not None:
            self._emptying.cancel()
        if self._thread is not None:
            await self._thread.close()
            self._thread = None

    async def ping(self) -> None:
        """Try what a turn needs, for nobody, and whether the disk takes a page."""
        await super().ping()
        self._probes = (self._probes + 1) % 2**31
        await self.fetch(f"PRAGMA user_version = {self._probes}")  # nobody's number: written, whatever it is

    async def delete_session(self, session_id: str) -> None:
        """Erase a session, from the file too: its pages are overwritten, and the write-ahead log is emptied."""
        await super().delete_session(session_id)
        if not await self._empty_log() and (self._emptying is None or self._emptying.done()):
            logger.warning("%s: another program reads it; %s-wal is emptied after that", self.where, self._path)
            self._emptying = asyncio.create_task(self._keep_emptying_log())

    async def _empty_log(self) -> bool:
        """Move the write-ahead log into the file and cut it to nothing; return False while another program reads it."""
        if self._thread is None:  # it is about to be opened again, which empties it
            return False
        with contextlib.suppress(sqlite3.Error):  # the size tells
            # In one script, so that no statement of anybody's waits for a reader, and none has this short patience.
            await self._thread.executescript("PRAGMA busy_timeout = 50; PRAGMA wal_checkpoint(TRUNCATE);")
        return self._log_is_empty()

    def _log_is_empty(self) -> bool:
        log = Path(f"{self._path}-wal")
        return not log.exists() or log.stat().st_size == 0

    async def _keep_emptying_log(self) -> None:
        while True:
            await asyncio.sleep(EMPTYING_SECONDS)
            if await self._empty_log():
                return

    async def fetch(self, sql: str, *values: object) -> Sequence[Any]:
        # By name: SQLite takes $1 for a named parameter, and Python 3.14 refuses to bind one by position.
        named = {str(position): value for position, value in enumerate(values, start=1)}
        loop = asyncio.get_running_loop()
        sql = respelled(sql, STATEMENT_SPELLINGS)
        job = Job(sql, named, time.monotonic() + self._timeout, loop.create_future())
        self._waiting.append(job)
        if self._worker is None:
            self._worker = loop.create_task(self._work())
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
        finally:
            job.given_up = True

    async def _work(self) -> None:
        """Hand over what waits, all at once, until nothing does."""
        try:
            while self._waiting:
                jobs, self._waiting = self._waiting, []
                await self._run(jobs)
                again = [job for job in jobs if job.may_run_again]
                self._waiting = again + self._waiting
                for job in jobs:
                    if job not in again:
                        job.finish()
        finally:
            self._worker = None

    async def _run(self, jobs: Sequence[Job]) -> None:
        try:
            if self._files is None or self._files_in_place() != self._files:
                await self._open_again()
            assert self._thread is not None
            await self._thread.run(run_together, jobs)
        except (sqlite3.Error, StorageError) as error:
            for job in jobs:
                job.error = error
        if any(getattr(job.error, "sqlite_errorname", "").startswith(OPENED_AGAIN) for job in jobs):
            self._files = None

    def _files_in_place(self) -> tuple[int, ...]:
        """Return which files have this one's and its log's names now: in others what is written would be lost."""
        try:
            found = [os.stat(path) for path in (self._path, f"{self._path}-wal")]
        except OSError:
            return ()  # a database in memory has none
        return tuple(number for file in found for number in (file.st_dev, file.st_ino))

    async def _open_again(self) -> None:
        """Turn to the file that has taken the place of the one that was opened; raise Unavailable where none has."""
        if not self._is_there():
            raise Unavailable("database: its file is gone")
        self._files = None
        if self._thread is not None:
            thread, self._thread = self._thread, None
            await thread.close()
        await self._open()

    def _is_there(self) -> bool:
        return self._path == ":memory:" or os.path.exists(self._path)
