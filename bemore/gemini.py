"""Google's Gemini over its REST interface; see https://ai.google.dev/api/generate-content."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Self
from urllib.parse import quote

import aiohttp

from bemore.counsellor import Blocked, Counsellor, Failed, MarkerFilter, Notice, Prompt

logger = logging.getLogger("bemore_voice")

MAX_LINE_BYTES = 1024 * 1024  # of the event stream: thought signatures make long lines
ATTEMPTS = 3  # before the first chunk; never after it
KEEPALIVE_SECONDS = 120  # people think between two turns; a new TLS connection costs 100 to 300 ms
TAIL_SECONDS = 0.5  # from the finish reason to the end of the body, so that the connection can be kept

# What an operator can mend; other statuses speak for themselves.
HINTS = {
    400: "check GEMINI_API_KEY, and whether GEMINI_MODEL takes GEMINI_THINKING_LEVEL and GEMINI_MAX_OUTPUT_TOKENS",
    401: "check GEMINI_API_KEY",
    403: "check GEMINI_API_KEY and what it may use",
    404: "check GEMINI_MODEL and GEMINI_BASE_URL",
}
RETRIED = frozenset({408, 429, *range(500, 600)})
# https://ai.google.dev/api/generate-content#FinishReason: those by which content was held back.
BLOCKED = frozenset({"SAFETY", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"})


def failed(cause: str) -> Failed:
    return Failed(f"Gemini: {cause}")


class TryAgain(Exception):
    """An answer that may be another the next time, after `pause` seconds where Gemini named them."""

    def __init__(self, cause: str, pause: float | None = None) -> None:
        super().__init__(cause)
        self.pause = pause


class Gemini(Counsellor):
    """One client for the process; every reply is a stream of its own. All limits are in seconds."""

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str,
        model: str,
        max_output_tokens: int,
        thinking_level: str,
        first_chunk_timeout: float,
        chunk_timeout: float,
        reply_timeout: float,
        keepalive: float = KEEPALIVE_SECONDS,
    ) -> None:
        self.name = model
        self._api_key = api_key
        self._model_url = f"{base_url}/models/{quote(model)}"
        self._generation: dict[str, object] = {"maxOutputTokens": max_output_tokens}
        if thinking_level:
            self._generation["thinkingConfig"] = {"thinkingLevel": thinking_level}
        self._first_chunk_timeout = first_chunk_timeout
        self._chunk_timeout = chunk_timeout
        self._reply_timeout = reply_timeout
        self._keepalive = keepalive
        self._client: aiohttp.ClientSession | None = None
        self._warm_until = 0.0  # by the loop's clock: so long a connection is kept
        self._warming: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._client = aiohttp.ClientSession(
            # No cap: 400 replies at once need 400 streams, and aiohttp would let 100 through.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self._keepalive),
            timeout=aiohttp.ClientTimeout(),  # reply() has limits of its own
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "x-goog-api-key": self._api_key,
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # compression would hold chunks back
            },
        )
        self.prepare()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._warming is not None:
            self._warming.cancel()
        if self._client is not None:
            await self._client.close()

    # Warm connections

    def prepare(self) -> None:
        """Open a connection where none is kept, so that the first word does not wait for TLS."""
        if asyncio.get_running_loop().time() >= self._warm_until:
            self._keep_warm()
            self._warming = asyncio.create_task(self._warm_up(), name="warm up")

    def _keep_warm(self) -> None:
        self._warm_until = asyncio.get_running_loop().time() + self._keepalive

    async def _warm_up(self) -> None:
        """Ask for the model's description, which costs nothing; a wrong key or name is told before anyone speaks."""
        assert self._client is not None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # a reply will find the same, and say so
            async with (
                asyncio.timeout(self._first_chunk_timeout),
                self._client.get(self._model_url, allow_redirects=False) as response,
            ):
                await response.read()
                if hint := HINTS.get(response.status):
                    logger.warning("Gemini: status %d for the model's description: %s", response.status, hint)

    # Replies

    def request_body(self, prompt: Prompt) -> dict[str, object]:
        """Return the body of streamGenerateContent; what the person said is only ever in a user part."""
        contents = []
        for turn in prompt.history:
            contents.append({"role": "user", "parts": [{"text": turn.user_message}]})
            contents.append({"role": "model", "parts": [{"text": turn.ai_response}]})
        contents.append({"role": "user", "parts": [{"text": prompt.message}]})
        return {
            "systemInstruction": {"parts": [{"text": prompt.instruction}]},
            "contents": contents,
            "generationConfig": self._generation,
        }

    async def reply(self, prompt: Prompt) -> AsyncGenerator[str | Notice, None]:
        loop = asyncio.get_running_loop()
        latest = loop.time() + self._reply_timeout
        body = json.dumps(self.request_body(prompt), ensure_ascii=False).encode()
        spoke, marker = False, MarkerFilter()
        try:
            async with asyncio.timeout_at(min(loop.time() + self._first_chunk_timeout, latest)) as limit:
                for attempt in range(1, ATTEMPTS + 1):
                    try:
                        async with contextlib.aclosing(self._stream(body)) as texts:
                            async for text in texts:
                                until = min(loop.time() + self._chunk_timeout, latest)
                                # To a hundredth of the limit: a timer a chunk would be a twelfth of a chunk's cost.
                                if not spoke or until - (limit.when() or 0) > self._chunk_timeout / 100:
                                    limit.reschedule(until)
                                spoke = True
                                for piece in marker.feed(text):
                                    yield piece
                        if rest := marker.rest():
                            yield rest
                        return
                    except TryAgain as error:
                        pause = random.uniform(0.1, 0.2) * 2**attempt if error.pause is None else error.pause
                        if spoke or attempt == ATTEMPTS or pause > (limit.when() or 0) - loop.time():
                            raise failed(f"{error}, attempt {attempt}") from None
                    await asyncio.sleep(pause)
        except TimeoutError:
            name = "CHUNK_TIMEOUT_SECONDS" if spoke else "FIRST_CHUNK_TIMEOUT_SECONDS"
            raise failed(f"{name if loop.time() < latest else 'REPLY_TIMEOUT_SECONDS'} passed") from None

    async def _stream(self, body: bytes) -> AsyncGenerator[str, None]:
        """Ask once and yield the answer's text; raise TryAgain, Failed or Blocked."""
        assert self._client is not None
        url = f"{self._model_url}:streamGenerateContent?alt=sse"
        try:
            # Not to follow redirects keeps the key from going to another host.
            async with self._client.post(url, data=body, allow_redirects=False) as response:
                check_status(response)
                answer, block = Answer(), b"more"
                while block and not answer.over:
                    block = await response.content.readany()
                    if text := answer.feed(block or b"\n"):  # the stream's end is its last line's too
                        yield text
                answer.check()
                await self._read_tail(response)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise TryAgain(f"connection failed ({type(error).__name__})") from None
        except aiohttp.ClientError as error:
            raise failed(f"not HTTP as it should be ({type(error).__name__})") from None

    async def _read_tail(self, response: aiohttp.ClientResponse) -> None:
        """Read what follows the last event, so that the connection can be kept for the next reply."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(TAIL_SECONDS):
                await response.content.read()
                self._keep_warm()


def check_status(response: aiohttp.ClientResponse) -> None:
    """Raise TryAgain where another attempt may help, Failed for any other status than 200."""
    if response.status in RETRIED:
        raise TryAgain(f"status {response.status}", parse_retry_after(response.headers.get("Retry-After"), time.time()))
    if response.status != 200:
        raise failed(f"status {response.status}: {HINTS.get(response.status, 'expected status 200')}")


class Answer:
    """An answer that is read in blocks, however these cut it: ``data:`` lines of one JSON value each.

    The rest of the format (https://html.spec.whatwg.org/#server-sent-events) is passed over.
    """

    def __init__(self) -> None:
        self._line = b""  # the beginning of one whose end has not come yet
        self._spoke = False
        self._finish = ""
        self._failure: Failed | None = None  # raised by check(), after the text that came before it

    @property
    def over(self) -> bool:
        return bool(self._finish or self._failure)

    def feed(self, block: bytes) -> str:
        """Return the text of all events that end in a block: what came together goes on together."""
        texts = []
        try:
            for line in self._lines(block):
                if line.startswith(b"data:") and not self._finish:
                    text, self._finish = read_event(parse_json(line[len(b"data:") :]))
                    texts.append(text)
        except Failed as failure:
            self._failure = failure
        text = "".join(texts)
        self._spoke = self._spoke or bool(text)
        return text

    def _lines(self, block: bytes) -> Iterator[bytes]:
        *ended, self._line = (self._line + block).split(b"\n")
        for line in ended:
            check_length(line)
            yield line
        check_length(self._line)

    def check(self) -> None:
        """Raise Blocked or Failed unless the answer ended as one should."""
        if self._failure is not None:
            raise self._failure
        if self._finish in BLOCKED:
            raise Blocked
        if not self._finish:
            raise failed("the stream ended without a finish reason")
        if self._finish == "MAX_TOKENS" and not self._spoke:
            raise failed("all tokens went into thinking: raise GEMINI_MAX_OUTPUT_TOKENS or lower GEMINI_THINKING_LEVEL")
        if self._finish not in ("STOP", "MAX_TOKENS"):
            raise failed("a finish reason that is no end of a reply")
        if not self._spoke:
            raise failed("STOP without any text")


def check_length(line: bytes) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise failed("a line of over 1 MiB")


def parse_json(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise failed("an event that is not JSON") from None


def read_event(event: Any) -> tuple[str, str]:
    """Return an event's text without its thoughts, and its finish reason, where a blocked prompt counts as SAFETY."""
    if "error" in mapping(event):
        raise failed("an error event inside the stream")
    if mapping(event.get("promptFeedback")).get("blockReason"):
        return "", "SAFETY"
    candidate = mapping((listing(event.get("candidates")) or [None])[0])
    parts = [mapping(part) for part in listing(mapping(candidate.get("content")).get("parts"))]
    texts = [part.get("text", "") for part in parts if not part.get("thought")]
    if not all(isinstance(text, str) for text in texts):
        raise failed("an event of another shape")
    return "".join(texts), str(candidate.get("finishReason") or "")


def mapping(value: Any) -> dict[str, Any]:
    """Return a JSON object as it is, and an empty one for nothing; raise Failed for anything else."""
    if not isinstance(value, dict | None):
        raise failed("an event of another shape")
    return value or {}


def listing(value: Any) -> list[Any]:
    """Return a JSON array as it is, and an empty one for nothing; raise Failed for anything else."""
    if not isinstance(value, list | None):
        raise failed("an event of another shape")
    return value or []


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None
