"""What the server stores: operations, their SQL and their errors; sqlite.py and postgres.py are the engines."""

from __future__ import annotations

import datetime
import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bemore.counsellor import PastTurn

logger = logging.getLogger("bemore_voice")

SCHEMA = Path(__file__).parent.parent / "schema.sql"
HISTORY_TURNS = 10
CLOCK_SKEW_US = 10_000_000  # the most by which the clocks of two replicas may differ
ERASE_BATCH = 20  # sessions that one statement erases, so that other statements do not wait for long

# Errors


class StorageError(Exception):
    """An operation that could not be done."""


class CannotStart(StorageError):
    """The database cannot be used. The text is one line for the operator and holds no part of a password."""


class UnknownSession(StorageError):
    """The session does not exist, or was deleted meanwhile."""


class NoToken(StorageError):
    """The session's token bucket is empty. The next token comes in `retry_after_ms`."""

    def __init__(self, retry_after_ms: int) -> None:
        super().__init__(retry_after_ms)
        self.retry_after_ms = retry_after_ms


class Unavailable(StorageError):
    """The database did not answer, or failed. `cause` holds neither what a person said nor a password."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class NotPermitted(Unavailable):
    """The database forbids the operation, such as adding a row to a table that another service owns."""


# Statements, in Postgres spelling

CREATE_SESSION = "INSERT INTO sessions (session_id) VALUES (CAST($1 AS TEXT)) ON CONFLICT (session_id) DO NOTHING"

# The statements below take the session from this clause, so that an unknown session gives no row. A violated foreign
# key would give an error instead, which Postgres would write to its log together with the session's id.
OF_SESSION = "FROM sessions WHERE session_id = CAST($1 AS TEXT)"

# Take a token and read what a request needs, in one round trip.
# This is the same rule as class TokenBucket in bemore_voice.py. The bucket is stored as the moment at which it is full
# again. A token moves that moment on by the time in which one token refills, and is refused if the moment would then be
# further away than an empty bucket takes to refill. One statement, so that two replicas cannot take the same token.
# A moment that lies even further away was stored before a clock stepped back. Such a bucket counts as full, so that the
# session is not locked out.
# $2 is now, $3 the refill time of one token, $4 the refill time of the whole bucket, all in microseconds.
ADMIT = f"""
INSERT INTO token_buckets (session_id, full_at)
SELECT CAST($1 AS TEXT), CAST($2 AS BIGINT) + CAST($3 AS BIGINT) {OF_SESSION}
ON CONFLICT (session_id) DO UPDATE SET full_at = CAST($3 AS BIGINT) + CASE
    WHEN token_buckets.full_at BETWEEN CAST($2 AS BIGINT) AND CAST($2 AS BIGINT) + CAST($4 AS BIGINT)
    THEN token_buckets.full_at ELSE CAST($2 AS BIGINT) END
WHERE token_buckets.full_at + CAST($3 AS BIGINT) <= CAST($2 AS BIGINT) + CAST($4 AS BIGINT)
    OR token_buckets.full_at > CAST($2 AS BIGINT) + CAST($4 AS BIGINT) + {CLOCK_SKEW_US}
RETURNING at_risk, (
    SELECT json_agg(json_build_array(id, user_message, ai_response)) FROM (
        SELECT id, user_message, ai_response FROM conversations
        WHERE session_id = CAST($1 AS TEXT) ORDER BY id DESC LIMIT CAST($5 AS BIGINT)
    ) AS last
)
"""
FULL_AT = "SELECT full_at FROM token_buckets WHERE session_id = CAST($1 AS TEXT)"

# The risk mark is stored in the row of the token bucket. A session without a bucket gets a full one.
MARK_AT_RISK = f"""
INSERT INTO token_buckets (session_id, full_at, at_risk) SELECT CAST($1 AS TEXT), 0, TRUE {OF_SESSION}
ON CONFLICT (session_id) DO UPDATE SET at_risk = TRUE
"""

# Safe to repeat, also while an earlier try still waits for a lock: a session stores each turn key once.
ADD_TURN = f"""
INSERT INTO conversations (session_id, turn_key, user_message, ai_response, emotion, timestamp)
SELECT CAST($1 AS TEXT), CAST($2 AS TEXT), CAST($3 AS TEXT), CAST($4 AS TEXT), CAST($5 AS TEXT), CAST($6 AS BIGINT)
{OF_SESSION} ON CONFLICT (session_id, turn_key) DO NOTHING RETURNING id
"""
FIND_TURN = "SELECT id FROM conversations WHERE session_id = CAST($1 AS TEXT) AND turn_key = CAST($2 AS TEXT)"

COLUMNS = ("id", "session_id", "user_message", "ai_response", "emotion", "timestamp", "created_at")
SAID = ", ".join(f"said.{column}" for column in COLUMNS)
# An existing session without turns gives one row of nulls.
CONVERSATIONS = f"""
SELECT {SAID} FROM sessions
LEFT JOIN conversations AS said ON said.session_id = sessions.session_id AND said.id < CAST($2 AS BIGINT)
WHERE sessions.session_id = CAST($1 AS TEXT) ORDER BY said.id DESC LIMIT CAST($3 AS BIGINT)
"""
# Foreign keys delete the session's rows in the other tables.
DELETE_SESSION = "DELETE FROM sessions WHERE session_id = CAST($1 AS TEXT) RETURNING session_id"

# Reads every column that a turn needs. No session has an empty id.
PING = f"""
SELECT bucket.full_at, bucket.at_risk, said.turn_key, {SAID} FROM sessions
LEFT JOIN token_buckets AS bucket ON bucket.session_id = sessions.session_id
LEFT JOIN conversations AS said ON said.session_id = sessions.session_id
WHERE sessions.session_id = '' LIMIT 1
"""

# $1 is the oldest moment to be kept, as text; $2 and $3 are that moment and the latest plausible time of a bucket in
# microseconds. A bucket in between belongs to a request of that time, whose turn may not be stored yet.
ERASE_OLD = f"""
DELETE FROM sessions WHERE session_id IN (
    SELECT session_id FROM sessions WHERE created_at < CAST(CAST($1 AS TEXT) AS TIMESTAMPTZ)
    AND NOT EXISTS (SELECT 1 FROM conversations AS said WHERE said.session_id = sessions.session_id
        AND said.created_at >= CAST(CAST($1 AS TEXT) AS TIMESTAMPTZ))
    AND NOT EXISTS (SELECT 1 FROM token_buckets AS bucket WHERE bucket.session_id = sessions.session_id
        AND bucket.full_at BETWEEN CAST($2 AS BIGINT) AND CAST($3 AS BIGINT))
    LIMIT {ERASE_BATCH}
) RETURNING session_id
"""
DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class NewTurn:
    """A turn to be stored, as it was shown; `timestamp` is the client's clock in ms. The key makes a retry harmless."""

    user_message: str
    ai_response: str
    emotion: str | None
    timestamp: int
    key: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True, slots=True)
class Admission:
    """What an admitted request needs: whether the session is at risk, and its last turns, the oldest first."""

    at_risk: bool
    history: list[PastTurn]


class Storage(ABC):
    """The operations, each one round trip unless it is refused. An engine adds how to connect and to run a statement.

    An operation raises UnknownSession if the session does not exist, and Unavailable if the database does not answer
    within the time limit. After Unavailable it is unknown whether the operation was done.
    """

    description: str  # for people to read, without a password
    _failing_since: float | None = None

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Connect and apply schema.sql; raise CannotStart if that is impossible."""

    @abstractmethod
    async def __aexit__(self, *_: object) -> None: ...

    @abstractmethod
    async def _run(self, sql: str, values: Sequence[object], *, create: bool) -> Sequence[Any]: ...

    async def fetch(self, sql: str, *values: object, create: bool = False) -> Sequence[Any]:
        """Run one statement and return its rows; `create` first creates session $1, in the same transaction."""
        try:
            rows = await self._run(sql, values, create=create)
        except NotPermitted:
            raise
        except Unavailable:
            self._failing_since = self._failing_since or time.monotonic()
            raise
        if self._failing_since is not None:
            seconds, self._failing_since = time.monotonic() - self._failing_since, None
            logger.info("%s: the database answers again, after %.1f s", self.description, seconds)
        return rows

    async def ping(self) -> None:
        """Read what a turn needs."""
        await self.fetch(PING)

    async def create_session(self, session_id: str) -> None:
        """Create a session unless it exists; raise NotPermitted if only another service may."""
        await self.fetch(CREATE_SESSION, session_id)

    async def admit(self, session_id: str, now_us: int, per_minute: int, *, create: bool = False) -> Admission:
        """Take one of the session's tokens, or raise NoToken."""
        refill = 60_000_000 // per_minute
        bucket = refill * per_minute
        taken = await self.fetch(ADMIT, session_id, now_us, refill, bucket, HISTORY_TURNS, create=create)
        if not taken:
            if not (rows := await self.fetch(FULL_AT, session_id)):
                raise UnknownSession
            raise NoToken(max(1, -(-(rows[0][0] + refill - bucket - now_us) // 1000)))
        ((at_risk, last),) = taken
        return Admission(bool(at_risk), [PastTurn(*said) for said in sorted(json.loads(last or "[]"))])

    async def mark_at_risk(self, session_id: str, *, create: bool = False) -> None:
        """Mark the session as at risk for as long as it exists. An unknown session has nothing to mark."""
        await self.fetch(MARK_AT_RISK, session_id, create=create)

    async def add_turn(self, session_id: str, turn: NewTurn, *, create: bool = False) -> None:
        """Store a turn once, however often this is called."""
        values = (turn.user_message, turn.ai_response, turn.emotion, turn.timestamp)
        stored = await self.fetch(ADD_TURN, session_id, turn.key, *values, create=create)
        if not (stored or await self.fetch(FIND_TURN, session_id, turn.key)):
            raise UnknownSession

    async def conversations(self, session_id: str, limit: int, before: int) -> list[dict[str, object]]:
        """Return the newest `limit` turns with ids below `before`, the oldest first, by column."""
        rows = await self.fetch(CONVERSATIONS, session_id, before, limit)
        if not rows:
            raise UnknownSession
        turns = [dict(zip(COLUMNS, map(json_value, row), strict=True)) for row in reversed(rows)]
        return [turn for turn in turns if turn["id"] is not None]

    async def delete_session(self, session_id: str) -> None:
        """Erase a session with all that it said; raise NotPermitted if only another service may."""
        if not await self.fetch(DELETE_SESSION, session_id):
            raise UnknownSession

    async def erase_older_than(self, days: float) -> int:
        """Erase a batch of sessions whose last turn, or creation, is older; return how many, 0 if none is left.

        On Postgres also 0 while another replica erases.
        """
        oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
        oldest_us = int(oldest.timestamp() * 1_000_000)
        return len(await self.fetch(ERASE_OLD, json_value(oldest), oldest_us, time.time_ns() // 1000 + DAY_US))


def json_value(value: object) -> object:
    """Return a column's value for JSON: Postgres gives a datetime where SQLite gives its text."""
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return value
