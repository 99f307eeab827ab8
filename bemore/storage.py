"""What the server keeps: the statements, their errors, and SQLite; postgres.py is the other engine."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiosqlite

from bemore.counsellor import Turn

logger = logging.getLogger("bemore_voice")

SCHEMA = Path(__file__).parent.parent / "schema.sql"
HISTORY_TURNS = 10
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

# A token bucket, told by when it is full again: a token moves that moment on by the time in which one refills,
# and is refused where the moment would lie further ahead than an empty bucket needs. One statement, so that two
# replicas cannot take the same token. $2 now, $3 one token's refill, $4 a whole bucket's, all in microseconds.
TAKE_TOKEN = """
INSERT INTO token_buckets (session_id, full_at) VALUES ($1, CAST($2 AS BIGINT) + CAST($3 AS BIGINT))
ON CONFLICT (session_id) DO UPDATE SET full_at = CAST($3 AS BIGINT)
    + CASE WHEN token_buckets.full_at > CAST($2 AS BIGINT) THEN token_buckets.full_at ELSE CAST($2 AS BIGINT) END
WHERE token_buckets.full_at + CAST($3 AS BIGINT) <= CAST($2 AS BIGINT) + CAST($4 AS BIGINT)
RETURNING at_risk
"""
FULL_AT = "SELECT full_at FROM token_buckets WHERE session_id = $1"

# Kept with the bucket, which is there or is made full.
MARK_AT_RISK = """
INSERT INTO token_buckets (session_id, full_at, at_risk) VALUES ($1, 0, TRUE)
ON CONFLICT (session_id) DO UPDATE SET at_risk = TRUE
"""

HISTORY = """
SELECT id, user_message, ai_response FROM conversations
WHERE session_id = CAST($1 AS TEXT) ORDER BY id DESC LIMIT CAST($2 AS BIGINT)
"""

# Safe to repeat when nobody knows whether the last try was committed: a session's turns are written one after
# another, so a row beyond the last one that was read ($6) with the same words is this very turn.
ADD_TURN = """
INSERT INTO conversations (session_id, user_message, ai_response, emotion, timestamp)
SELECT CAST($1 AS TEXT), CAST($2 AS TEXT), CAST($3 AS TEXT), CAST($4 AS TEXT), CAST($5 AS BIGINT)
WHERE NOT EXISTS (
    SELECT 1 FROM conversations
    WHERE session_id = CAST($1 AS TEXT) AND id > CAST($6 AS BIGINT) AND timestamp = CAST($5 AS BIGINT)
    AND user_message = CAST($2 AS TEXT) AND ai_response = CAST($3 AS TEXT)
)
"""

COLUMNS = ("id", "session_id", "user_message", "ai_response", "emotion", "timestamp", "created_at")
# One row at least where there is such a session, its columns empty where nothing was said.
CONVERSATIONS = f"""
SELECT {", ".join(f"said.{column}" for column in COLUMNS)} FROM sessions
LEFT JOIN conversations AS said ON said.session_id = sessions.session_id AND said.id < CAST($2 AS BIGINT)
WHERE sessions.session_id = CAST($1 AS TEXT) ORDER BY said.id DESC LIMIT CAST($3 AS BIGINT)
"""
DELETE_SESSION = "DELETE FROM sessions WHERE session_id = $1 RETURNING session_id"  # the rest goes by its foreign keys

# The smallest honest translation of schema.sql; SQLite knows no ADD COLUMN IF NOT EXISTS and must be asked first.
SQLITE_SPELLINGS = {
    "BIGSERIAL PRIMARY KEY": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "TIMESTAMPTZ": "TEXT",
    "DEFAULT now()": "DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))",
}


ADD_COLUMN = re.compile(r"ALTER TABLE (\w+) ADD COLUMN IF NOT EXISTS (\w+) (.*);")


@dataclass(frozen=True, slots=True)
class NewTurn:
    """A turn to be stored: what was said, as it was shown; `timestamp` by the client's clock, in milliseconds."""

    user_message: str
    ai_response: str
    emotion: str | None
    timestamp: int


class Storage(ABC):
    """The operations, each of one statement; an engine adds how it connects and how it runs one.

    Every operation raises UnknownSession where the session does not exist, and Unavailable where the database does not
    answer within its time limit.
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

    async def ping(self) -> None:
        await self.fetch("SELECT session_id FROM sessions LIMIT 1")

    async def create_session(self, session_id: str) -> None:
        """Create a session where there is none yet; raise NotPermitted where only another service may."""
        await self.fetch(CREATE_SESSION, session_id)

    async def take_token(self, session_id: str, now_us: int, per_minute: int) -> bool:
        """Take one of the session's tokens and return whether the session is at risk, or raise NoToken."""
        refill = 60_000_000 // per_minute
        bucket = refill * per_minute
        taken = await self.fetch(TAKE_TOKEN, session_id, now_us, refill, bucket)
        if not taken:
            wait_us = max(
                (full_at + refill - bucket - now_us for (full_at,) in await self.fetch(FULL_AT, session_id)), default=0
            )
            raise NoToken(max(1, -(-wait_us // 1000)))
        ((at_risk,),) = taken
        return bool(at_risk)

    async def mark_at_risk(self, session_id: str) -> None:
        """Note, for as long as the session lasts, that it holds a sign of danger."""
        await self.fetch(MARK_AT_RISK, session_id)

    async def history(self, session_id: str, turns: int = HISTORY_TURNS) -> list[Turn]:
        """Return the session's last turns, the oldest first."""
        return [Turn(*row) for row in reversed(await self.fetch(HISTORY, session_id, turns))]

    async def add_turn(self, session_id: str, turn: NewTurn, last_id: int) -> None:
        """Store a turn once, however often this is called; `last_id` is the last turn's before it, or 0."""
        values = (turn.user_message, turn.ai_response, turn.emotion, turn.timestamp)
        await self.fetch(ADD_TURN, session_id, *values, last_id)

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


def sqlite_schema(schema: str) -> tuple[str, list[tuple[str, str, str]]]:
    """Return schema.sql in SQLite's words, and apart from it the columns that are added: table, name, definition."""
    for postgres, sqlite in SQLITE_SPELLINGS.items():
        schema = schema.replace(postgres, sqlite)
    return ADD_COLUMN.sub("", schema), ADD_COLUMN.findall(schema)


class SQLite(Storage):
    """One connection, in a thread of its own; in autocommit, each statement is its own transaction."""

    def __init__(self, url: str, timeout: float) -> None:
        self._path = url.removeprefix("sqlite:///")
        self._timeout = timeout  # seconds, for one statement
        self._connection: aiosqlite.Connection | None = None
        self._emptying: asyncio.Task[None] | None = None
        self.where = f"SQLite {self._path}"

    async def __aenter__(self) -> Self:
        try:
            if self._path != ":memory:":
                with contextlib.suppress(OSError):  # it is there, or SQLite says below what is wrong
                    os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))  # for this user's eyes only
            sqlite3.connect(self._path).close()  # where it cannot be opened, aiosqlite's thread outlives the loop
            self._connection = await aiosqlite.connect(self._path, timeout=self._timeout, isolation_level=None)
            await self._connection.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON; PRAGMA secure_delete = ON;"
            )
            await self._apply_schema()
            await self._empty_log()  # a process that was killed may have left there what it erased
        except sqlite3.Error as error:
            await self.__aexit__()
            raise Unavailable(str(error)) from None
        return self

    async def _apply_schema(self) -> None:
        assert self._connection is not None
        schema, added = sqlite_schema(SCHEMA.read_text(encoding="utf-8"))
        await self._connection.executescript(schema)
        for table, column, rest in added:
            rows = await self._connection.execute_fetchall(f"SELECT name FROM pragma_table_info('{table}')")
            if column not in {name for (name,) in rows}:
                await self._connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {rest}")

    async def __aexit__(self, *_: object) -> None:
        if self._emptying is not None:
            self._emptying.cancel()
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def delete_session(self, session_id: str) -> None:
        """Erase a session, from the file too: its pages are overwritten, and the write-ahead log is emptied."""
        await super().delete_session(session_id)
        if not await self._empty_log() and (self._emptying is None or self._emptying.done()):
            logger.warning("%s: another program reads it; %s-wal is emptied after that", self.where, self._path)
            self._emptying = asyncio.create_task(self._keep_emptying_log())

    async def _empty_log(self) -> bool:
        """Move the write-ahead log into the file and cut it to nothing; return False while another program reads it."""
        assert self._connection is not None
        with contextlib.suppress(sqlite3.Error):  # the size tells
            # In one script, so that no statement of anybody's waits for a reader, and none has this short patience.
            await self._connection.executescript(
                "PRAGMA busy_timeout = 50; PRAGMA wal_checkpoint(TRUNCATE);"
                f"PRAGMA busy_timeout = {self._timeout * 1000:.0f}"
            )
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
        assert self._connection is not None
        # By name: SQLite takes $1 for a named parameter, and Python 3.14 refuses to bind one by position.
        named = {str(position): value for position, value in enumerate(values, start=1)}
        try:
            async with asyncio.timeout(self._timeout):
                return list(await self._connection.execute_fetchall(sql, named))
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorname == "SQLITE_CONSTRAINT_FOREIGNKEY":
                raise UnknownSession from None
            raise Unavailable(f"database: {error.sqlite_errorname}") from None
        except sqlite3.Error as error:
            raise Unavailable(f"database: {getattr(error, 'sqlite_errorname', type(error).__name__)}") from None
        except TimeoutError:
            raise Unavailable("database: DATABASE_TIMEOUT_SECONDS passed") from None
