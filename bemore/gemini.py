"""Google's Gemini over its REST interface; see https://ai.google.dev/api/generate-content."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import logging
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import aiohttp

from bemore.counsellor import Blocked, Counsellor, Failed, MarkerFilter, Notice, Prompt, Say

logger = logging.getLogger("bemore_voice")

MAX_LINE_BYTES = 1024 * 1024  # of the event stream: thought signatures make long lines
MAX_SILENT_BYTES = 2 * 1024 * 1024  # of one answer without any text that is heard
PIECE_BYTES = 16 * 1024  # of an answer that is read at a time: others have their turn in between
ATTEMPTS = 3  # at the first text, of the first model; the fallback is asked once
KEEPALIVE_SECONDS = 120  # people think between two turns; a new TLS connection costs 100 to 300 ms
TAIL_SECONDS = 0.5  # from the finish reason to the end of the body, so that the connection can be kept

# What an operator can mend, where {setting} names the model; other statuses speak for themselves.
HINTS = {
    400: "check GEMINI_API_KEY, and whether {setting} takes GEMINI_THINKING_LEVEL and GEMINI_MAX_OUTPUT_TOKENS",
    401: "check GEMINI_API_KEY",
    403: "check GEMINI_API_KEY and what it may use",
    404: "check {setting} and GEMINI_BASE_URL",
}
NO_STATUS = 0  # the connection failed
RETRIED = frozenset({NO_STATUS, 408, 429, *range(500, 600)})
UNAVAILABLE = frozenset({404, 429, *range(500, 600)})  # the model is gone or overloaded; another may not be
# https://ai.google.dev/api/generate-content#FinishReason: those by which content was held back.
BLOCKED = frozenset({"SAFETY", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"})

# Asks for the rest of an answer that was cut off, from its last word on, since that may have broken in its middle.
GO_ON = """\
(앱에서 알려 드립니다. 통신이 끊겨 당신의 답이 도중에 멈췄고, 상대는 바로 위에 적힌 데까지만 들었습니다. 인사나 사과, \
설명 없이 하던 말을 이어서 마쳐 주세요. 끊긴 자리의 마지막 어절부터 다시 적어 자연스럽게 이어 가고, 그보다 앞의 말은 \
되풀이하지 마세요. 더 할 말이 없다면 마지막 어절만 적어 주세요.)"""
CLOSING = ".,!?…~)]”’"  # no space stands before these


def failed(cause: str) -> Failed:
    return Failed(f"Gemini: {cause}")


class Fault(Exception):
    """A request that brought no whole answer, where another request may."""

    def __init__(
        self, cause: str, *, status: int = NO_STATUS, pause: float | None = None, dropped: bool = False
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.status = status
        self.pause = pause  # in seconds, where Gemini named them
        self.dropped = dropped  # an open connection was, before any answer: it may have been kept for too long


@dataclass(frozen=True, slots=True)
class Model:
    setting: str  # that names it
    url: str


class Course:
    """Which request of a reply comes next: the same again, one to the fallback, or one for the rest of the answer."""

    def __init__(self, model: Model, fallback: Model | None) -> None:
        self.model = model
        self.first = True  # only this request may take a kept connection
        self._fallback = fallback
        self._attempt, self._last = 1, ATTEMPTS
        self._cut_off = False

    def after(self, fault: Fault, spoke: bool, left: float) -> float:
        """Return the seconds until the next request; raise Failed where none is left, or none in the time that is.

        `spoke` tells whether there was any text before the fault.
        """
        first, self.first = self.first, False
        if self._cut_off:
            raise failed(f"{fault.cause}, for the rest of an answer that was cut off")
        if spoke:
            self._cut_off = True
            logger.warning("Gemini: %s: asking for the rest of the answer", fault.cause)
            return 0
        if first and fault.dropped:
            return 0  # it may never have reached Gemini: no attempt
        cause = f"{fault.cause}, attempt {self._attempt}" if fault.status in RETRIED else fault.cause
        pause = self._pause(fault)
        if pause > left:
            if self._fallback is None or fault.status not in UNAVAILABLE:
                raise failed(cause)
            logger.warning("Gemini: %s: asking GEMINI_FALLBACK_MODEL", cause)
            self.model, self._fallback, self._last, pause = self._fallback, None, self._attempt + 1, 0
        self._attempt += 1
        return pause

    def _pause(self, fault: Fault) -> float:
        """Return the seconds until the same model is asked again; infinite where it is not."""
        if fault.status not in RETRIED or self._attempt == self._last:
            return math.inf
        if fault.pause is not None:
            return fault.pause
        if fault.status == 429 and self._fallback is not None:
            return math.inf  # nobody knows for how long its quota is used up
        return random.uniform(0.1, 0.2) * 2.0**self._attempt


class Joint:
    """Joins the rest of an answer to what was said before it was cut off: no words twice, and a space between.

    The rest begins with the last word again, or with more of what was said: so much is held back until it differs.
    """

    def __init__(self, said: str) -> None:
        self._said = said  # nothing once the two are joined
        self._held = ""

    def feed(self, text: str) -> str:
        """Return what can be said so far."""
        if not self._said:
            return text  # nearly always
        self._held += text
        words, again = self._said.rstrip(), self._held.lstrip()
        if any(words.startswith(again, word.start()) for word in re.finditer(r"\S+", words)):
            return ""
        return self.rest()

    def rest(self) -> str:
        """Return what was held back, once it is known where it goes on."""
        said, text = self._said, self._held
        self._said = self._held = ""
        words, again = said.rstrip(), text.lstrip()
        whole_word = said != words
        for word in re.finditer(r"\S+", words):
            repeated, more = words[word.start() :], again[len(words) - word.start() :]
            if again.startswith(repeated) and not (whole_word and more[:1].strip()):
                return more.lstrip() if whole_word else more
        if whole_word or not again:
            return again
        return text if text != again or again[0] in CLOSING else f" {text}"


class Hearing:
    """Passes on what one request brings: without the marker, joined to what was said before, and in time.

    `limit` ends the request where no text comes for `patience` seconds, or a tenth more, and at `latest` by the loop's
    clock: a timer a chunk would be a twelfth of a chunk's cost.
    """

    def __init__(self, said: str, say: Say, limit: asyncio.Timeout, patience: float, latest: float) -> None:
        self.spoke = False
        self._said = [said]
        self._say = say
        self._limit = limit
        self._patience = patience
        self._latest = latest
        self._ends = 0.0
        self._marker = MarkerFilter()
        self._joint = Joint(said)

    @property
    def said(self) -> str:
        """All that was said so far; what the marker's filter still holds is not, and comes again with the rest."""
        return "".join(self._said)

    def hear(self, text: str) -> None:
        now = asyncio.get_running_loop().time()
        if now + self._patience > self._ends < self._latest:
            self._ends = min(now + 1.1 * self._patience, self._latest)
            self._limit.reschedule(self._ends)
        self.spoke = True
        for piece in self._marker.feed(text):
            if isinstance(piece, Notice):
                self._say(piece)
            else:
                self._pass_on(self._joint.feed(piece))

    def end(self) -> None:
        self._pass_on(self._joint.feed(self._marker.rest()) + self._joint.rest())

    def _pass_on(self, words: str) -> None:
        if words:
            self._said.append(words)
            self._say(words)


class Gemini(Counsellor):
    """One client for the process; every reply is a stream of its own. All limits are in seconds."""

    kind = "gemini"

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str,
        model: str,
        fallback_model: str = "",
        max_output_tokens: int,
        thinking_level: str,
        first_chunk_timeout: float,
        chunk_timeout: float,
        reply_timeout: float,
        keepalive: float = KEEPALIVE_SECONDS,
    ) -> None:
        self._api_key = api_key
        self._model = Model("GEMINI_MODEL", f"{base_url}/models/{quote(model)}")
        self._fallback: Model | None = None
        self.name = model
        if fallback_model:
            url = f"{base_url}/models/{quote(fallback_model)}"
            self._fallback = Model("GEMINI_FALLBACK_MODEL", url)
            self.name = f"{model}, fallback {fallback_model}"
        self._generation: dict[str, object] = {"maxOutputTokens": max_output_tokens}
        if thinking_level:
            self._generation["thinkingConfig"] = {"thinkingLevel": thinking_level}
        self._first_chunk_timeout = first_chunk_timeout
        self._chunk_timeout = chunk_timeout
        self._reply_timeout = reply_timeout
        self._keepalive = keepalive
        self._kept: aiohttp.ClientSession | None = None  # its connections are, for the next reply
        self._fresh: aiohttp.ClientSession | None = None  # opens a connection for each request
        self._warm_until = 0.0  # by the loop's clock: so long a connection is kept
        self._warming: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._kept = self._open_client(keepalive_timeout=self._keepalive)
        self._fresh = self._open_client(force_close=True)
        self.prepare()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._warming is not None:
            self._warming.cancel()
        for client in (self._kept, self._fresh):
            if client is not None:
                await client.close()

    def _open_client(self, **connections: Any) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # No cap: 400 replies at once need 400 streams, and aiohttp would let 100 through.
            connector=aiohttp.TCPConnector(limit=0, **connections),
            timeout=aiohttp.ClientTimeout(),  # reply() has limits of its own
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=PIECE_BYTES,  # twice as much waits to be read; a model's pieces are a hundredth of it
            auto_decompress=False,  # a few bytes may stand for any number
            headers={
                "x-goog-api-key": self._api_key,
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # compression would hold chunks back
            },
        )

    # Warm connections

    def prepare(self) -> None:
        """Open a connection where none is kept, so that the first word does not wait for TLS."""
        if asyncio.get_running_loop().time() >= self._warm_until:
            self._keep_warm()
            self._warming = asyncio.create_task(self._warm_up(), name="warm up")

    def _keep_warm(self) -> None:
        self._warm_until = asyncio.get_running_loop().time() + self._keepalive

    async def _warm_up(self) -> None:
        """Ask for the models' descriptions, which costs nothing; a wrong key or name is told before anyone speaks."""
        assert self._kept is not None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # a reply will find the same, and say so
            async with asyncio.timeout(self._first_chunk_timeout):
                for model in filter(None, (self._model, self._fallback)):
                    async with self._kept.get(model.url, allow_redirects=False) as response:
                        if hint := hint_for(response.status, model):
                            logger.warning("Gemini: status %d for the model's description: %s", response.status, hint)
                        await drain(response)

    # Replies

    def request_body(self, prompt: Prompt, said: str = "") -> dict[str, object]:
        """Return the body of streamGenerateContent; what the person said is only ever in a user part.

        `said` is what there was of an answer that was cut off: the rest is asked for.
        """
        contents = []
        for turn in prompt.history:
            contents.append({"role": "user", "parts": [{"text": turn.user_message}]})
            contents.append({"role": "model", "parts": [{"text": turn.ai_response}]})
        contents.append({"role": "user", "parts": [{"text": prompt.message}]})
        if said:
            contents.append({"role": "model", "parts": [{"text": said}]})
            contents.append({"role": "user", "parts": [{"text": GO_ON}]})  # models refuse to go on after their own turn
        return {
            "systemInstruction": {"parts": [{"text": prompt.instruction}]},
            "contents": contents,
            "generationConfig": self._generation,
        }

    async def reply(self, prompt: Prompt, say: Say) -> None:
        loop = asyncio.get_running_loop()
        latest = loop.time() + self._reply_timeout
        first_text_by = min(loop.time() + self._first_chunk_timeout, latest)
        course, said = Course(self._model, self._fallback), ""
        while True:
            limit = asyncio.timeout_at(first_text_by)
            hearing = Hearing(said, say, limit, self._chunk_timeout, latest)
            try:
                async with limit:
                    await self._stream(course, prompt, said, hearing.hear)
                    hearing.end()
                return
            except TimeoutError:
                if loop.time() >= latest:
                    raise failed("REPLY_TIMEOUT_SECONDS passed") from None
                if not hearing.spoke:
                    raise failed("FIRST_CHUNK_TIMEOUT_SECONDS passed") from None
                fault = Fault("CHUNK_TIMEOUT_SECONDS passed")
            except Fault as error:
                fault = error
            said = hearing.said
            pause = course.after(fault, hearing.spoke, first_text_by - loop.time())
            if hearing.spoke:
                first_text_by = min(loop.time() + self._first_chunk_timeout, latest)
            await asyncio.sleep(pause)

    async def _stream(self, course: Course, prompt: Prompt, said: str, hear: Callable[[str], None]) -> None:
        """Ask once, and pass the answer's text on as it comes; raise Fault, Failed or Blocked."""
        client = self._kept if course.first else self._fresh
        assert client is not None
        url = f"{course.model.url}:streamGenerateContent?alt=sse"
        body = json.dumps(self.request_body(prompt, said), ensure_ascii=False).encode()
        try:
            # Not to follow redirects keeps the key from going to another host.
            async with client.post(url, data=body, allow_redirects=False) as response:
                check_head(response, course.model)
                answer, block = Answer(spoke=bool(said)), b"more"
                while block and not answer.over:
                    block = await response.content.readany()
                    for at in range(0, len(block), PIECE_BYTES):
                        if at:
                            await asyncio.sleep(0)
                        if text := answer.feed(block[at : at + PIECE_BYTES]):
                            hear(text)
                if text := answer.end():
                    hear(text)
                answer.check()
                if client is self._kept:
                    await self._read_tail(response)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            dropped = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientPayloadError)
            raise Fault(f"connection failed ({type(error).__name__})", dropped=dropped) from None
        except aiohttp.ClientError as error:
            raise failed(f"not HTTP as it should be ({type(error).__name__})") from None

    async def _read_tail(self, response: aiohttp.ClientResponse) -> None:
        """Read what follows the last event, so that the connection can be kept for the next reply."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(TAIL_SECONDS):
                await drain(response)
                self._keep_warm()


async def drain(response: aiohttp.ClientResponse) -> None:
    """Read a body to its end, and keep nothing of it."""
    while await response.content.readany():
        pass


def hint_for(status: int, model: Model) -> str:
    return HINTS.get(status, "").format(setting=model.setting)


def check_head(response: aiohttp.ClientResponse, model: Model) -> None:
    """Raise Fault where another request may help, Failed where the body is no answer that can be read."""
    status = response.status
    if status in RETRIED:
        pause = parse_retry_after(response.headers.get("Retry-After"), time.time())
        raise Fault(f"status {status}", status=status, pause=pause)
    if status in UNAVAILABLE:
        raise Fault(f"status {status}: {hint_for(status, model)}", status=status)
    if status != 200:
        raise failed(f"status {status}: {hint_for(status, model) or 'expected status 200'}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise failed("a Content-Encoding that was not asked for: check the proxy at GEMINI_BASE_URL")


class Answer:
    """An answer that is read in blocks, however these cut it: ``data:`` lines of one JSON value each.

    The rest of the format (https://html.spec.whatwg.org/#server-sent-events) is passed over.
    """

    def __init__(self, *, spoke: bool = False) -> None:
        self._silent = 0  # bytes, since there was text
        self._line = b""  # the beginning of one whose end has not come yet
        self._spoke = spoke  # it may be the rest of an answer, and nothing be left
        self._finish = ""
        self._failure: Failed | None = None  # raised by check(), after the text that came before it

    @property
    def over(self) -> bool:
        return bool(self._finish or self._failure)

    def feed(self, block: bytes) -> str:
        """Return the text of all events that end in a block: what came together goes on together."""
        texts = []
        self._silent += len(block)
        *ended, self._line = (self._line + block).split(b"\n")
        try:
            check_length(self._silent, MAX_SILENT_BYTES, "silence")
            for line in ended:
                check_length(len(line), MAX_LINE_BYTES, "a line")
                if line.startswith(b"data:") and not self._finish:
                    text, self._finish = read_event(parse_json(line[len(b"data:") :]))
                    texts.append(text)
            check_length(len(self._line), MAX_LINE_BYTES, "a line")
        except Failed as failure:
            self._failure = failure
        if text := "".join(texts):
            self._spoke, self._silent = True, 0
        return text

    def end(self) -> str:
        """Return the text of a last line without its end; one that broke off in its middle is no event."""
        return self.feed(b"\n") if self._line.rstrip().endswith(b"}") else ""

    def check(self) -> None:
        """Raise Blocked, Failed, or Fault for one that was cut off, unless the answer ended as one should."""
        if self._failure is not None:
            raise self._failure
        if self._finish in BLOCKED:
            raise Blocked
        if not self._finish:
            cut_off = "the stream ended without a finish reason"
            raise Fault(cut_off) if self._spoke else failed(cut_off)
        if self._finish == "MAX_TOKENS" and not self._spoke:
            raise failed("all tokens went into thinking: raise GEMINI_MAX_OUTPUT_TOKENS or lower GEMINI_THINKING_LEVEL")
        if self._finish not in ("STOP", "MAX_TOKENS"):
            raise failed("a finish reason that is no end of a reply")
        if not self._spoke:
            raise failed("STOP without any text")


def check_length(length: int, most: int, what: str) -> None:
    if length > most:
        raise failed(f"{what} of over {most >> 20} MiB")


def parse_json(text: bytes) -> object:
    try:
        return json.loads(text.decode())  # of bytes the encoding would be guessed
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
