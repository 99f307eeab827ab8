"""A streamed answer as text: server-sent events that contain JSON. This module does no I/O and knows no model's JSON.

The format of events: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from bemore.attempts import SENTENCE_END, Action, RetryableError
from bemore.counsellor import Blocked

# Of an answer without any text that is said; one event with thought signatures can have 900 KiB.
MAX_SILENT_BYTES = 2 * 1024 * 1024
MAX_BARE_BYTES = 64 * 1024
OTHER_FIELDS = (b"event", b"id", b"retry", b":")
DECODER = json.JSONDecoder()


class EventStream:
    """Cuts a byte stream into the data of its events, however its blocks cut it."""

    def __init__(self) -> None:
        # The beginning of a line that has not ended, and the data of an event that has not ended.
        self._line = self._data = b""
        # Lines that belong to no event: some servers write an error as bare JSON.
        self._bare = b""
        # The last block ended with CR; LF at the start of the next one belongs to it.
        self._after_cr = False

    def feed(self, block: bytes) -> list[bytes]:
        """Return the data of all events that end in a block."""
        if self._after_cr and block:
            block, self._after_cr = block.removeprefix(b"\n"), False
        block = block.replace(b"\r\n", b"\n")
        if b"\r" in block:
            self._after_cr = block.endswith(b"\r")
            block = block.replace(b"\r", b"\n")
        *lines, self._line = (self._line + block).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                # The parts of an event's data are joined by an end of a line, which means nothing in JSON.
                self._data += line[len(b"data:") :] + b"\n"
            elif line:
                self._take_other(line)
            elif self._data:
                events.append(self._data)
                self._data = b""
        return events

    def _take_other(self, line: bytes) -> None:
        if line.startswith(codecs.BOM_UTF8 + b"data:"):
            self._data += line[len(codecs.BOM_UTF8 + b"data:") :] + b"\n"
        elif not line.startswith(OTHER_FIELDS) and len(self._bare) < MAX_BARE_BYTES:
            self._bare += line + b"\n"

    def end(self) -> list[bytes]:
        """Return what the end of the stream leaves over: an event without its blank line, and lines of no event."""
        return [*self.feed(b"\n\n"), self._bare.removeprefix(codecs.BOM_UTF8)]


class End(Enum):
    """Why a model ended its answer."""

    COMPLETE = "complete"
    TOKENS = "tokens"  # the limit of tokens was reached
    BLOCKED = "blocked"  # by a safety filter


class Event(NamedTuple):
    """What one event says; `status` is that of an error event, as an HTTP status."""

    text: str = ""
    end: End | None = None
    status: int = 0


class AnswerParser:
    """Reads the answer to one request.

    `read_event` takes one event's JSON, and raises AttributeError, LookupError or TypeError if it has another shape.
    `error_of` takes the status and the JSON of an error event. `tokens_hint` says what to do if all tokens were used up
    without any text.
    """

    def __init__(
        self,
        read_event: Callable[[Any], Event],
        error_of: Callable[[int, Any], RetryableError],
        tokens_hint: str,
    ) -> None:
        self.end: End | None = None
        self.error: RetryableError | None = None
        self._read_event, self._error_of = read_event, error_of
        self._tokens_hint = tokens_hint
        self._stream = EventStream()
        self._silent_bytes = 0
        # The first half of a surrogate pair; JSON may cut a character into two events.
        self._half = ""

    def feed(self, block: bytes) -> str:
        """Return the text of all events that end in a block."""
        self._silent_bytes += len(block)
        if self._silent_bytes > MAX_SILENT_BYTES:
            raise RetryableError(f"over {MAX_SILENT_BYTES >> 20} MiB without any text", Action.FAIL)
        text = ""
        for data in self._stream.feed(block):
            text += self._text_of(data)
        if text:
            self._silent_bytes = 0
        return text

    def close(self) -> str:
        """Return the text of what was left over when the answer ended; what broke off inside an event has none."""
        text = ""
        for data in filter(None, self._stream.end()):
            with contextlib.suppress(ValueError, RecursionError):
                content = DECODER.decode(data.decode())
                # A server that does not stream sends one event or a list of them.
                for event in content if isinstance(content, list) else [content]:
                    text += self._take(event)
        return self._join_halves(text)

    def check(self, said: str, *, noticed: bool = False) -> None:
        """Raise Blocked or RetryableError unless the answer ended as it should.

        `said` is the whole reply so far, `noticed` tells whether the answer holds a marker, which needs no words.
        """
        if self.end is End.BLOCKED:
            raise Blocked
        if self.error is not None:
            self.error.may_end = self.end is not None
            raise self.error
        if self.end is None:
            raise RetryableError("the stream ended without a finish reason", Action.RETRY_OR_FALLBACK)
        if not said and not noticed:
            hint = f": {self._tokens_hint}" if self.end is End.TOKENS else ""
            raise RetryableError(f"an answer without any text{hint}", Action.RETRY_OR_FALLBACK)
        if self.end is End.TOKENS and said and not SENTENCE_END.search(said):
            raise RetryableError("the tokens ended inside a sentence", Action.FAIL, sentence_open=True)

    def _text_of(self, data: bytes) -> str:
        """Return the text of an event's data."""
        try:
            # The encoding of bytes would be guessed.
            event = DECODER.decode(data.decode())
        except (ValueError, RecursionError):
            if data.strip() == b"[DONE]":
                self.end = self.end or End.COMPLETE
            elif data.strip():
                self._fail("an event that is not JSON")
            return ""
        text = self._take(event)
        # Only an escape can be half a surrogate pair.
        return self._join_halves(text) if self._half or b"\\u" in data else text

    def _take(self, event: Any) -> str:
        if self.error is not None:
            return ""
        try:
            text, end, status = self._read_event(event)
        except (AttributeError, LookupError, TypeError):
            self._fail("an event of another shape")
            return ""
        if status:
            self.error = self._error_of(status, event)
        if end is not None:
            self.end = end
        return text

    def _fail(self, cause: str) -> None:
        self.error = self.error or RetryableError(cause, Action.RETRY_OR_FALLBACK)

    def _join_halves(self, text: str) -> str:
        text = self._half + text
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return text.removesuffix(self._half).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def status_of(error: Any) -> int:
    """Return the HTTP status that an error object names as its code; 500 if it names none."""
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return int(code) if re.fullmatch("[45][0-9]{2}", code) else 500
