"""The log: one line a record, which never holds what was said, a token or a session's id."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import traceback
import warnings
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

logger = logging.getLogger("bemore_voice")

# Within this time the same stray exception is logged once.
SAME_LINE_SECONDS = 60


def anonymous(session_id: str) -> str:
    """Return the name of a session for the log: knowing the id itself is enough to listen to the session."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:12]


def describe_bug(bug: BaseException) -> str:
    """Return the type of an exception and where it was raised; its own text may quote what was said."""
    frames = traceback.extract_tb(bug.__traceback__)
    return type(bug).__name__ + (f" in {frames[-1].name}, line {frames[-1].lineno}" if frames else "")


class LogFormatter(logging.Formatter):
    """Write each record on one line, and of an exception only its type and place.

    The text of a library's exception may quote what was said, or a request line with its token.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if not line.isprintable():
            line = "".join(character if character.isprintable() else " " for character in line)
        return line

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        return describe_bug(ei[1])


def configure_logging(level: str) -> None:
    """Send all lines to stderr: this server's from `level` on, those of libraries from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
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


class StrayExceptionLog:
    """Log exceptions of tasks that nothing awaits; asyncio's own line would hold the exception's text.

    The same line is logged once in SAME_LINE_SECONDS: a process without free file descriptors raises hundreds.
    """

    def __init__(self) -> None:
        self._line = ""
        # Loop time until which the same line is not logged again.
        self._quiet_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        bug = context.get("exception")
        line = context.get("message", "") + ("" if bug is None else f": {describe_bug(bug)}")
        # A second after the file descriptors ran out, asyncio accepts again, even on a listener that is closed by then.
        if "._start_serving(" in line:
            return
        if line != self._line or loop.time() >= self._quiet_until:
            self._line, self._quiet_until = line, loop.time() + SAME_LINE_SECONDS
            logger.error("%s", line)
