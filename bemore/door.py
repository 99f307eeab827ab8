"""The door: how many connections there may be, how long one may take, and what of it nobody need see or count again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, cast

from aiohttp import WSCloseCode, hdrs, web
from aiohttp.http import HttpProcessingError, RawRequestMessage, WebSocketReader
from aiohttp.streams import StreamReader
from aiohttp.web_request import BaseRequest
from multidict import CIMultiDict, CIMultiDictProxy

MAX_HEADER_BYTES = 16 * 1024  # of a request, and of all that wait behind it; aiohttp's own limits add up to 1 MiB each
PIECE_BYTES = 4 * 1024  # handed to the parser at a time, so that a header that is too long is not parsed first
SPARE_CONNECTIONS = 64  # beyond the most: they are told so, and close
READ_ON_BYTES = 4 * 1024  # of a WebSocket after a frame was refused, or to that frame's end where it is longer
LONGEST_WORDS_BYTES = 26 * 1024  # of a frame with 2,000 characters, each a pair of escapes
SWEEP_SECONDS = 1  # between two looks at all connections whose time is limited

Handler = Callable[[BaseRequest], Any]


class FrameWatch:
    """Reads the header of each frame that a WebSocket's peer sends, on its way to aiohttp's parser.

    Every frame is counted: the parser tells of whole messages, and one may come in any number of empty fragments. One
    without a mask is refused, as RFC 6455 (5.1) asks for and the parser does not.
    """

    __slots__ = ("_head", "_left", "_pause", "_refuse", "_refused", "_spare", "_take", "parser")

    def __init__(
        self, take: Callable[[int, int, float], bool], refuse: Callable[[WSCloseCode], None], pause: Callable[[], None]
    ) -> None:
        self.parser: WebSocketReader | None = None
        self._take = take
        self._refuse = refuse
        self._pause = pause
        self._refused = False
        self._spare = READ_ON_BYTES
        self._head = b""  # the beginning of a frame's header, which the parser has already
        self._left = 0  # bytes of a frame's payload that are still to come

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Pass data on; where a frame in it is refused, `refuse` is called between what came before it and the rest."""
        assert self.parser is not None
        if not self._refused and (fault := self._scan(data)) is not None:
            code, sound = fault
            self._refused = True
            self.parser.feed_data(data[:sound])
            self._refuse(code)
            data = data[sound:]
        return self._read_on(data) if self._refused else self.parser.feed_data(data)

    def _read_on(self, data: bytes) -> tuple[bool, bytes]:
        """Pass on a little after a refusal, for a plea for help or the peer's own close frame, and read no more."""
        assert self.parser is not None
        some, self._spare = data[: self._spare], max(0, self._spare - len(data))
        if not self._spare:
            self._pause()
        return self.parser.feed_data(some) if some else (False, b"")

    def feed_eof(self) -> None:
        assert self.parser is not None
        self.parser.feed_eof()

    def _scan(self, data: bytes) -> tuple[WSCloseCode, int] | None:
        """Count the frames that begin in `data`; return why one is refused, and how much came before it."""
        passed = len(self._head)
        data, at = self._head + data, self._left
        while at + 2 <= len(data):
            length = data[at + 1] & 0x7F
            extended = {126: 2, 127: 8}.get(length, 0)
            end = at + 2 + extended + 4  # of the header: two bytes, the length, the mask
            if not data[at + 1] & 0x80:
                return WSCloseCode.PROTOCOL_ERROR, max(0, at - passed)
            if end > len(data):
                break
            if extended:
                length = int.from_bytes(data[at + 2 : end - 4], "big")
            if not self._take(data[at] & 0x0F, length, asyncio.get_running_loop().time()):
                self._spare = max(READ_ON_BYTES, min(end - at + length, LONGEST_WORDS_BYTES))
                return WSCloseCode.POLICY_VIOLATION, max(0, at - passed)
            at = end + length
        self._head = bytes(data[at:])
        self._left = max(0, at - len(data))
        return None


def with_own_headers(message: Any) -> Any:
    """Return a request with headers that can be let go of, and no second copy of them, which the parser made.

    Without its subprotocols: none is spoken here, and aiohttp would log the tokens in them.
    """
    if not isinstance(message, RawRequestMessage):
        return message  # what is no HTTP
    headers = CIMultiDict(message.headers)
    headers.popall(hdrs.SEC_WEBSOCKET_PROTOCOL, None)
    if not headers.get(hdrs.EXPECT, "").isascii():
        headers[hdrs.EXPECT] = "unknown"  # aiohttp would fail at quoting it
    return message._replace(headers=cast("CIMultiDictProxy[str]", headers), raw_headers=())


class Connection(web.RequestHandler):
    """One connection: its header, each of its requests and its answers have their time and their size."""

    __slots__ = (
        "_answered",
        "_body",
        "_door",
        "_header_bytes",
        "_headers",
        "_moved",
        "_unread_before",
        "_until",
        "_watch",
        "_wire",
        "surplus",
    )

    def __init__(self, door: Door, **options: Any) -> None:
        super().__init__(door, **options)
        self.surplus = False  # one over the limit, to be told so
        self._door = door
        self._wire: asyncio.Transport | None = None  # until it is lost; aiohttp forgets its own when it closes it
        self._until = math.inf  # by the loop's time: what is under way must be over
        self._unread_before = 0  # bytes of an answer, and
        self._moved = 0.0  # when there were other than now
        self._answered = False  # the last request, and nothing has come since
        self._body: StreamReader | None = None  # of the request that came last
        self._headers: CIMultiDict[str] = CIMultiDict()  # of the request that is answered
        self._header_bytes = 0  # of requests that have not come whole, or wait behind another
        self._watch: FrameWatch | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._wire = cast(asyncio.Transport, transport)
        self._allow(self._door.header_seconds)
        self._door.admit(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._door.leave(self)
        super().connection_lost(exc)
        self._wire = self._watch = self._body = None

    def cut(self) -> None:
        """Break the connection without a word."""
        if self._wire is not None:
            self._wire.abort()

    # Time

    def overdue(self, now: float) -> bool:
        """Tell whether something takes too long; between two requests aiohttp's keep-alive counts."""
        unread = self._unread()
        if self._answered and not unread:
            self._until = math.inf
        if not unread or unread != self._unread_before:
            self._unread_before, self._moved = unread, now
        return now > self._until or now - self._moved > self._door.stall_seconds

    def begin(self, message: RawRequestMessage) -> None:
        """Note that a request's handler begins."""
        self._headers = message.headers if isinstance(message.headers, CIMultiDict) else CIMultiDict()
        self._answered = False
        if not self._messages:
            self._header_bytes = 0
        self._allow(self._door.request_seconds)

    def _allow(self, seconds: float) -> None:
        """Set an end for what begins now; an answer that is not taken keeps the end that it has."""
        if not self._unread():
            self._until = self._loop.time() + seconds

    def _unread(self) -> int:
        return 0 if self._wire is None else self._wire.get_write_buffer_size()

    # Bytes come in

    def data_received(self, data: bytes) -> None:
        if self._payload_parser is not None:
            super().data_received(data)
            return
        if data and self._answered:
            self._answered = False
            self._allow(self._door.header_seconds)
        for start in range(0, max(1, len(data)), PIECE_BYTES):
            self._read_piece(data[start : start + PIECE_BYTES])

    def _read_piece(self, piece: bytes) -> None:
        """Hand a piece to the parser; refuse headers, or what follows a handshake, where too much of it waits."""
        requests = self._request_count
        if self._body is None or self._body.is_eof():
            self._header_bytes += len(piece)
        super().data_received(piece)
        if whole := self._request_count != requests:
            self._body = self._messages[-1][1]
            for place in range(len(self._messages) - self._request_count + requests, len(self._messages)):
                message, body = self._messages[place]
                self._messages[place] = with_own_headers(message), body
        if self._header_bytes > MAX_HEADER_BYTES and not (whole and len(self._messages) == 1):
            self._header_bytes = 0
            if self._upgraded:
                self.cut()
            else:
                super().data_received(b"\0")  # which no header may hold: it is answered as any other bad one

    def watch_frames(self, take: Callable[[int, int, float], bool], refuse: Callable[[WSCloseCode], None]) -> None:
        """Have `take` count each frame of the WebSocket by opcode, bytes and time; `refuse` gets a close code."""
        self._watch = FrameWatch(take, refuse, self._stop_reading)

    def _stop_reading(self) -> None:
        if self._wire is not None:
            self._wire.pause_reading()

    def set_parser(self, parser: WebSocketReader, data_received_cb: Callable[[], None] | None = None) -> None:
        """Turn to a WebSocket, whose time has no limit here; its handshake's headers would be held as long as it is."""
        self._door.release(self)
        self._headers.clear()
        self._parser = None  # it holds them, too
        self._body = None
        if self._watch is not None:
            self._watch.parser, parser = parser, cast(WebSocketReader, self._watch)
        super().set_parser(parser, data_received_cb)

    # Answers go out

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer in the server's own words what is no HTTP, or what a handler failed at; aiohttp would quote it."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionError  # nobody is there to be answered, or it is too late
        self.log_exception("a request failed", exc_info=exc)
        response = self._door.answer(status)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **options: Any) -> None:
        """Log a mistake of ours: that a client has left, or sent what is no body, is nothing that an operator mends."""
        if not isinstance(options.get("exc_info"), ConnectionError | web.RequestPayloadError | HttpProcessingError):
            super().log_exception(*args, **options)

    async def finish_response(
        self, request: BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if self._payload_parser is not None and not isinstance(resp, web.WebSocketResponse):
            self.cut()  # a handler failed, and what the peer reads is a WebSocket by now
            return resp, True
        if isinstance(resp, web.HTTPException):
            resp = self._door.answer(resp.status)
        if self.surplus:
            resp.force_close()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._answered = True
            if isinstance(resp, web.Response):
                resp.body = None  # sent; aiohttp would hold it as long as the connection is kept
            if self._wire is not None and self._payload_parser is not None:  # a WebSocket that has ended
                self._allow(self._door.header_seconds)
                self._door.limit(self)


class Door(web.Server):
    """Serves at most so many connections, and closes those that take too long.

    `answer` makes the answer for a status that no handler gives. A header has `header_seconds` from its first byte, or
    from the connection's beginning; a request `request_seconds` from there until its answer is taken, and of what is
    unsent something must be taken every `stall_seconds`.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        request_factory: Callable[..., BaseRequest],
        answer: Callable[[int], web.Response],
        most: int,
        header_seconds: float,
        request_seconds: float,
        stall_seconds: float,
        **options: Any,
    ) -> None:
        super().__init__(handler, request_factory=self._receive, **options)
        self.answer = answer
        self.header_seconds = header_seconds
        self.request_seconds = request_seconds
        self.stall_seconds = stall_seconds
        self.count = 0  # of connections, from their acceptance to their end
        self._most = most
        self._make = request_factory
        self._limited: set[Connection] = set()  # whose time is limited: all but WebSockets
        self._sweeping: asyncio.TimerHandle | None = None  # one for all of them

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)

    def admit(self, connection: Connection) -> None:
        """Count a connection; one over the limit is marked, one far over it cut."""
        self.count += 1
        connection.surplus = self.count > self._most
        self.limit(connection)
        if self.count > self._most + SPARE_CONNECTIONS:
            connection.cut()

    def leave(self, connection: Connection) -> None:
        self.count -= 1
        self._limited.discard(connection)

    def limit(self, connection: Connection) -> None:
        self._limited.add(connection)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def release(self, connection: Connection) -> None:
        self._limited.discard(connection)

    def _sweep(self) -> None:
        now = self._loop.time()
        for connection in [each for each in self._limited if each.overdue(now)]:
            connection.cut()
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep) if self._limited else None

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's own
        await super().shutdown(timeout)
        if self._sweeping is not None:
            self._sweeping.cancel()

    def _receive(
        self, message: RawRequestMessage, payload: StreamReader, protocol: web.RequestHandler, writer: Any, task: Any
    ) -> BaseRequest:
        cast(Connection, protocol).begin(message)
        return self._make(message, payload, protocol, writer, task)
