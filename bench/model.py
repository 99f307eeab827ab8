"""A stand-in for Gemini that costs next to nothing: every event of a reply is encoded before the first request.

    python bench/model.py PORT

The first part of a request's path says how the reply comes: /chunks-first_ms-gap_ms/... The text of chunk n is
chunk_text(n), so that a reader of the reply can check it character for character. The last event comes with the last
chunk, as Gemini sends it. A request that holds the word ENDLESS is answered by chunks without an end, as fast as they
are taken, and one that holds SPEECHLESS by events without a text.
"""

import asyncio
import json
import re
import sys
from collections.abc import Coroutine
from functools import cache
from typing import Any

EVENTS_IN_A_BLOCK = 100  # of a reply without an end, so that its writing does not keep the others waiting
ENDLESS, SPEECHLESS = "endless", "speechless"  # a request is answered so where it holds the word
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk_text(number: int) -> str:
    return f"{number}번째 조각입니다. "


def reply_text(chunks: int) -> str:
    return "".join(map(chunk_text, range(chunks)))


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop, where it is installed: what stands around a server should cost little."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


@cache
def events(chunks: int) -> list[bytes]:
    """Return the events of a reply."""
    return [framed(number, chunk_text(number), last=number == chunks - 1) for number in range(chunks)]


@cache
def framed(number: int, text: str, *, last: bool = False) -> bytes:
    """Return an event as large as Gemini's own, framed for HTTP."""
    candidate: dict[str, object] = {"content": {"parts": [{"text": text}], "role": "model"}, "index": 0}
    if last:
        candidate["finishReason"] = "STOP"
    event = {
        "candidates": [candidate],
        "usageMetadata": {
            "promptTokenCount": 420,
            "candidatesTokenCount": 2 * number,
            "totalTokenCount": 420 + 2 * number,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 420}],
        },
        "modelVersion": "gemini-3.5-flash-lite",
        "responseId": "wQ4mabCdEfGhIjKlMnOpQr",
    }
    line = b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\r\n\r\n"
    return b"%x\r\n%b\r\n" % (len(line), line)


class Gemini(asyncio.Protocol):
    """One kept-alive connection; a request's body is passed over by its Content-Length."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.buffer = b""
        self.timer: asyncio.Handle | None = None
        self.endless = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, _: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if length is None or len(body) < int(length[1]):
            return
        self.buffer = b""
        for word, text in ((ENDLESS, chunk_text(0)), (SPEECHLESS, "")):
            if word.encode() in body:
                self.endless = framed(0, text) * EVENTS_IN_A_BLOCK
                self.transport.write(HEAD)
                self.say_on()
                return
        path = re.match(rb"POST /(\d+)-(\d+)-(\d+)/", head)
        if path is None:  # a connection that is warmed up
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        chunks, first_ms, gap_ms = map(int, path.groups())
        self.events, self.gap, self.next = events(chunks), gap_ms / 1000, 0
        self.due = self.loop.time() + first_ms / 1000
        self.timer = self.loop.call_at(self.due, self.say)

    def say(self) -> None:
        """Write the chunks that are due, each on its own; without a gap one in each turn of the loop."""
        now = self.loop.time()
        while self.next < len(self.events) and self.due <= now:
            event = self.events[self.next]
            head, tail = HEAD if self.next == 0 else b"", END if self.next == len(self.events) - 1 else b""
            self.transport.write(head + event + tail)
            self.next += 1
            self.due += self.gap
            if not self.gap:
                break
        self.timer = self.loop.call_at(self.due, self.say) if self.next < len(self.events) else None

    # A reply without an end

    def say_on(self) -> None:
        self.timer = self.loop.call_soon(self.say_on)  # before the write, which may ask for a pause
        self.transport.write(self.endless)

    def pause_writing(self) -> None:
        if self.endless and self.timer is not None:
            self.timer.cancel()

    def resume_writing(self) -> None:
        if self.endless:
            self.say_on()


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Gemini(loop), "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    run(serve(int(sys.argv[1])))
