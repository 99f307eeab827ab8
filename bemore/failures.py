"""What a person gets in place of a reply: error codes, and the failure that carries one."""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    EMPTY_MESSAGE = "empty_message"
    MESSAGE_TOO_LONG = "message_too_long"
    INVALID_REQUEST = "invalid_request"
    RATE_LIMITED = "rate_limited"
    SESSION_EXPIRED = "session_expired"
    AI_UNAVAILABLE = "ai_unavailable"


class Failure(Exception):
    """What the person gets in place of a reply, or of the rest of one.

    `cause` is for the log alone. It never holds a person's words, a key, or the text of a library's exception.
    """

    def __init__(self, code: ErrorCode, cause: str = "", retry_after_ms: int | None = None) -> None:
        super().__init__(code, cause)
        self.code = code
        self.cause = cause
        self.retry_after_ms = retry_after_ms
