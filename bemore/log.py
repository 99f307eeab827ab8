"""The log: one line a record, which never holds what was said, a token or a session's id."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

logger = logging.getLogger("bemore_voice")

SAME_LINE_SECONDS = 60


def anonymous(session_id: str) -> str:
    """Return the name of a session for the log: knowing the id itself is enough to listen to the session."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:12]


def describe_bug(bug: BaseException) -> str:
    """Return the type of an exception and where it was raised; its own text may quote what was said."""
    frames = traceback.extract_tb(bug.__traceback__)
    return type(bug).__name__ + (f" in {frames[-1].name}, line {frames[-1].lineno}" if frames else "")


def logfmt(**fields: object) -> str:
    """Return fields as key=value; a value with spaces, quotes or = in it is quoted."""
    return " ".join(f"{name}={quote(str(value))}" for name, value in fields.items())


def quote(value: str) -> str:
    if value and not re.search(r'[\s="\\]', value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


class LogFormatter(logging.Formatter):
    """Write each record as one line of logfmt, and of an exception only its type and place.

    A message that is no logfmt becomes the value of msg. The text of a library's exception may quote what was said, or
    a request line with its token.
    """

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if not line.isprintable():
            line = "".join(character if character.isprintable() else " " for character in line)
        return line

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        if not re.match(r"[a-z_]+=", record.message):
            record.message = logfmt(msg=record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        return logfmt(exception=describe_bug(ei[1]))


def configure_logging(level: str) -> None:
    """Send all lines to stderr: this server's from `level` on, those of libraries from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("time=%(asctime)s level=%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logger.setLevel(level.upper())
    quiet_libraries()


def quiet_libraries() -> None:
    """Keep out of the log what libraries write about clients, and what this server says in its own words."""
    logging.getLogger("aiohttp.server").addFilter(is_own_mistake)
    # aiohttp lists the subprotocols that it does not speak: some clients put tokens there.
    logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)
    # asyncpg logs a page for each failed connection; this server's own line has the cause.
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)
    # PyJWT warns at every token; this server warns once, at the start.
    warnings.filterwarnings("ignore", message=".*HMAC key.*")


def is_own_mistake(record: logging.LogRecord) -> bool:
    """Tell whether a record of aiohttp is about this server, and not about a client that left or sent no HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, ConnectionError | web.RequestPayloadError | HttpProcessingError)


class LogLimit:
    """Lets each kind of line into the log once in SAME_LINE_SECONDS."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        # By kind, the moment from which a line is due again.
        self._due_at: dict[str, float] = {}

    def is_due(self, kind: str) -> bool:
        """Tell whether a line of this kind may be written now; it counts as written then."""
        now = self._monotonic()
        if now < self._due_at.get(kind, now):
            return False
        self._due_at[kind] = now + SAME_LINE_SECONDS
        return True


class StrayExceptionLog:
    """Log exceptions of tasks that nothing awaits; asyncio's own line would hold the exception's text.

    The limit is for a process without free file descriptors, which raises hundreds.
    """

    def __init__(self) -> None:
        self._limit = LogLimit()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        bug = context.get("exception")
        line = context.get("message", "") + ("" if bug is None else f": {describe_bug(bug)}")
        # A second after the file descriptors ran out, asyncio accepts again, even on a listener that is closed by then.
        if "._start_serving(" in line:
            return
        if self._limit.is_due(line):
            logger.error("%s", line)
