"""One WebSocket: writes that do not wait, and a peer that does not read is disconnected."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

import aiohttp
from aiohttp import WSCloseCode, WSMsgType, web

# Messages that a peer sends while the connection is open.
OPEN = (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.PING, WSMsgType.PONG)
# The longest header that a server writes before a frame.
FRAME_HEADER_BYTES = 10


class Client:
    """The server's end of one WebSocket.

    Frames that the peer does not take stay in the transport's buffer. The connection is cut if the buffer exceeds
    `max_unsent_bytes`, if something in it is older than `stall_seconds`, or if the peer answers nothing to a ping for
    `heartbeat_seconds`. All times are in seconds.
    """

    __slots__ = (
        "_close_done",
        "_close_seconds",
        "_heard",
        "_heartbeat",
        "_heartbeat_seconds",
        "_max_unsent_bytes",
        "_request",
        "_sent_since_check",
        "_stall_seconds",
        "_stall_timer",
        "_transport",
        "said_goodbye",
        "token",
        "ws",
    )

    def __init__(
        self,
        request: web.Request,
        *,
        max_frame_bytes: int,
        max_unsent_bytes: int,
        heartbeat_seconds: float,
        stall_seconds: float,
        close_seconds: float,
        token: str = "",
    ) -> None:
        assert request.transport is not None
        self.ws = web.WebSocketResponse(
            autoping=False,  # Pongs are passed on: they tell which frames have arrived.
            autoclose=False,  # receive() and close() do the closing handshake.
            compress=False,
            max_msg_size=max_frame_bytes + 1,  # aiohttp refuses a message of exactly this size.
            timeout=close_seconds,
            writer_limit=sys.maxsize,  # send() does not wait for the peer; _check() disconnects one that stalls.
        )
        self._request = request
        self._transport: asyncio.Transport = request.transport
        self._max_unsent_bytes = max_unsent_bytes
        self._heartbeat_seconds = heartbeat_seconds
        self._stall_seconds = stall_seconds
        self._close_seconds = close_seconds
        self.token = token  # the newest that the peer has
        self.said_goodbye = False  # whether the peer has sent a close frame
        self._close_done: asyncio.Future[None] | None = None  # None until close(); done when the connection has ended
        self._heard = True  # since the last heartbeat
        self._heartbeat: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._sent_since_check = 0

    async def open(self) -> None:
        """Answer the handshake."""
        await self.ws.prepare(self._request)
        # They are sent, and would take 1.4 KiB for as long as the connection is open.
        self.ws.headers.clear()
        self._start_heartbeat()

    async def receive(self) -> aiohttp.WSMessage | None:
        """Return the peer's next message; None once the connection ends. Messages after close() are dropped."""
        while (message := await self.ws.receive()).type in OPEN:
            self._heard = True
            if self._close_done is None:
                return message
        self.said_goodbye = message.type is WSMsgType.CLOSE
        if self._close_done is None and self.said_goodbye:
            await self.ws.close(drain=False)
        return None

    async def pause(self, seconds: float) -> bool:
        """Read nothing from the peer for a while; return whether the connection is still open then."""
        self._request.protocol.pause_reading()
        await asyncio.sleep(seconds)
        self._request.protocol.resume_reading()
        return not self._transport.is_closing()

    def send(self, frame: bytes, opcode: WSMsgType = WSMsgType.TEXT) -> None:
        """Write a frame. One to a peer that is gone is dropped: receive() is about to return None."""
        if self._close_done is not None:
            return
        try:
            run_to_end(self.ws.send_frame(frame, opcode))
        except ConnectionResetError:
            return
        self._sent_since_check += len(frame) + FRAME_HEADER_BYTES
        if unsent := self._transport.get_write_buffer_size():
            if unsent > self._max_unsent_bytes:
                self._transport.abort()
            elif self._stall_timer is None:
                self._start_stall_timer()

    def close(self, code: WSCloseCode, reason: bytes = b"") -> asyncio.Future[None]:
        """Send a close frame; return a future that is done once the connection has ended.

        The connection is cut unless the peer answers in time. aiohttp's own close() would not wait for the peer
        beside a task that reads, and the network may then drop frames that are on their way to it.
        """
        if self._close_done is None:
            self.send(code.to_bytes(2, "big") + reason, WSMsgType.CLOSE)
            loop = asyncio.get_running_loop()
            self._close_done = loop.create_future()
            loop.call_later(self._close_seconds, self._transport.abort)
        return self._close_done

    def leave(self) -> None:
        """Note that the connection has ended."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._close_done is not None:
            self._close_done.set_result(None)
            self._transport.close()

    def _beat(self) -> None:
        """Ping the peer; cut the connection if nothing has come since the last ping.

        aiohttp's heartbeat would cut a peer that floods, whose pong waits behind its other frames.
        """
        if not self._heard:
            self._transport.abort()
            return
        self._heard = False
        self.send(b"", WSMsgType.PING)
        self._start_heartbeat()

    def _start_heartbeat(self) -> None:
        self._heartbeat = asyncio.get_running_loop().call_later(self._heartbeat_seconds, self._beat)

    def _start_stall_timer(self) -> None:
        self._sent_since_check = 0
        self._stall_timer = asyncio.get_running_loop().call_later(self._stall_seconds, self._check)

    def _check(self) -> None:
        """Cut the connection if something is unsent that was written before the timer started."""
        self._stall_timer = None
        unsent = self._transport.get_write_buffer_size()
        if unsent > self._sent_since_check:
            self._transport.abort()
        elif unsent:
            self._start_stall_timer()


def run_to_end(step: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits, as aiohttp's send_frame() without compression and below its writer limit."""
    try:
        step.send(None)
    except StopIteration:
        return
    step.close()
    raise RuntimeError("a send that waits")
