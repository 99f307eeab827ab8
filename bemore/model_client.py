"""A counsellor that asks a model over HTTP and reads its answer as server-sent events.

This module knows no model's JSON: bemore/gemini.py and bemore/openai.py are its two subclasses.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import logging
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, Self

import aiohttp

from bemore.attempts import (
    TAIL_SECONDS,
    Action,
    Model,
    ReplyReader,
    RetryableError,
    RetryPlan,
    TimeLimits,
    conversation,
)
from bemore.counsellor import Counsellor, Prompt, Say
from bemore.event_stream import AnswerParser, Event

logger = logging.getLogger("bemore_voice")

# Of an answer that are read at a time, so that other replies have their turn in between.
PIECE_BYTES = 16 * 1024
MAX_ERROR_BYTES = 64 * 1024
# People think between two turns, and a new TLS connection costs 100 to 300 ms.
KEEPALIVE_SECONDS = 120
# google.rpc.RetryInfo in the body of an error, or the same in its message.
RETRY_DELAY = re.compile(r'(?:"retryDelay": "|retry in )(\d+(?:\.\d+)?)s')


class Rule(NamedTuple):
    """What follows a refused request."""

    statuses: Container[int]
    # A regular expression that the JSON of the error must match.
    words: str
    action: Action
    # For the operator.
    hint: str = ""


class ModelClient(Counsellor):
    """One client for the process; each reply is one stream or a few."""

    # Stands in front of each log line and cause.
    label: str
    # Says what to do if an answer has used up its tokens without any text.
    tokens_hint: str
    # What follows a status; the first rule that fits counts, and the last one fits all.
    rules: Sequence[Rule]
    # Reads one event of an answer; see AnswerParser.
    read_event: Callable[[Any], Event]

    def __init__(
        self, models: Sequence[Model], headers: Mapping[str, str], limits: TimeLimits, keepalive: float
    ) -> None:
        self.name = ", fallback ".join(model.name for model in models)
        self.models = models
        # Whether the optional parameters are sent; a model may refuse them.
        self._options = True
        self._headers = headers
        self._limits = limits
        self._keepalive = keepalive
        # The first request of a reply takes a kept connection, each further one opens its own: after a while without
        # requests all kept connections may be dead.
        self._kept: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        # Loop time until which a connection is kept.
        self._warm_until = 0.0
        self._warming: asyncio.Task[None] | None = None

    # What a subclass says about its interface

    @abstractmethod
    def request(self, model: Model, instruction: str, texts: Sequence[str], options: bool) -> tuple[str, object]:
        """Return the URL and the body that ask for a reply.

        `texts` are the person's and the model's in turn; `options` tells whether to send the optional parameters. A
        fallback model never gets them.
        """

    @abstractmethod
    def probes(self) -> list[tuple[Model, str]]:
        """Return URLs that cost nothing, to open a connection and to check the settings."""

    def error_of(self, status: int, content: Any, model: Model, pause: float | None = None) -> RetryableError:
        """Say what follows an HTTP status or an error event; `content` is its JSON, `pause` that of a Retry-After."""
        words = json.dumps(content, ensure_ascii=False)
        rule = next(rule for rule in self.rules if status in rule.statuses and re.search(rule.words, words))
        hint = rule.hint.format(setting=model.setting)
        if pause is None and (delay := RETRY_DELAY.search(words)):
            pause = float(delay[1])
        return RetryableError(f"status {status}" + (f": {hint}" if hint else ""), rule.action, pause=pause)

    # Connections

    async def __aenter__(self) -> Self:
        self._kept = self._open_session(keepalive_timeout=self._keepalive)
        self._fresh = self._open_session(force_close=True)
        self.prepare()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._warming is not None:
            self._warming.cancel()
        for session in (self._kept, self._fresh):
            if session is not None:
                await session.close()

    def _open_session(self, **connections: Any) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # aiohttp's default limit would let 100 of 400 replies through.
            connector=aiohttp.TCPConnector(limit=0, **connections),
            # The limits of reply() hold.
            timeout=aiohttp.ClientTimeout(),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=PIECE_BYTES,
            # A few compressed bytes may stand for any number, and compression would hold text back.
            auto_decompress=False,
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity", **self._headers},
        )

    def prepare(self) -> None:
        """Open a connection if none is kept, so that the first word does not wait for TLS."""
        if asyncio.get_running_loop().time() >= self._warm_until:
            self._note_warm()
            self._warming = asyncio.create_task(self._warm_up(), name="warm up")

    def _note_warm(self) -> None:
        self._warm_until = asyncio.get_running_loop().time() + self._keepalive

    async def _warm_up(self) -> None:
        """Send the probes; a wrong key or name is logged before the first request."""
        assert self._kept is not None
        # A reply will meet the same failure and log it.
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(self._limits.first_chunk):
                for model, url in self.probes():
                    async with self._kept.get(url, allow_redirects=False) as response:
                        if response.status != 200:
                            error = await self._read_error(response, model)
                            if error.action in (Action.FAIL, Action.FALLBACK):
                                logger.warning("%s: %s", self.label, error.cause)
                        await drain(response)

    # Replies

    async def reply(self, prompt: Prompt, say: Say) -> None:
        loop = asyncio.get_running_loop()
        latest = loop.time() + self._limits.reply
        first_text_by = min(loop.time() + self._limits.first_chunk, latest)
        plan, said = RetryPlan(self.label, self.models), ""
        while True:
            limit = asyncio.timeout_at(first_text_by)
            options = self._options and plan.model is self.models[0]
            reader = ReplyReader(said, say, limit.reschedule, self._limits.chunk, latest)
            try:
                return await self._attempt(plan, prompt, reader, limit, options)
            except RetryableError as caught:
                error = self._after_refusal(caught, options)
            except TimeoutError:
                # A reply that still speaks at the end of its time is cut and completes.
                if reader.spoke and loop.time() >= latest:
                    return
                error = timeout_error(reader, loop.time(), first_text_by, latest)
            said = reader.said
            if reader.spoke:
                first_text_by = min(loop.time() + self._limits.first_chunk, latest)
            pause = plan.after(error, said, first_text_by - loop.time())
            if pause is None:
                return
            await asyncio.sleep(pause)

    def _after_refusal(self, error: RetryableError, options: bool) -> RetryableError:
        """Send no optional parameters any more if the model refused them; `options` tells whether they were sent."""
        if error.action is Action.REPEAT_WITHOUT_OPTIONS:
            if not options:
                error.action = Action.FAIL
            elif self._options:
                self._options = False
                logger.warning("%s: %s", self.label, error.cause)
        return error

    async def _attempt(
        self, plan: RetryPlan, prompt: Prompt, reader: ReplyReader, limit: asyncio.Timeout, options: bool
    ) -> None:
        """Ask once; raise RetryableError, TimeoutError or Blocked unless the reply is whole then."""
        model, texts = plan.model, conversation(prompt, reader.said, plan.request_for_rest)
        url, body = self.request(model, prompt.instruction, texts, options)
        answer = AnswerParser(
            self.read_event, lambda status, event: self.error_of(status, event, model), self.tokens_hint
        )
        session = self._kept if plan.first else self._fresh
        assert session is not None
        try:
            async with limit:
                await self._stream(session, url, json.dumps(body, ensure_ascii=False).encode(), model, answer, reader)
        except (RetryableError, TimeoutError):
            if not reader.finished:
                raise
        reader.hear_last(answer.close())
        answer.check(reader.said, noticed=reader.noticed)
        reader.end()

    async def _stream(
        self,
        session: aiohttp.ClientSession,
        url: str,
        body: bytes,
        model: Model,
        answer: AnswerParser,
        reader: ReplyReader,
    ) -> None:
        """Send a request, and pass the answer's text on as it comes; raise RetryableError."""
        try:
            # Following a redirect would send the key to another host.
            async with session.post(url, data=body, allow_redirects=False) as response:
                if response.status != 200:
                    raise await self._read_error(response, model)
                if not is_plain(response):
                    raise RetryableError("a Content-Encoding that was not asked for: check the proxy", Action.FAIL)
                while answer.error is None and (block := await response.content.readany()):
                    for at in range(0, len(block), PIECE_BYTES):
                        if at:
                            await asyncio.sleep(0)
                        if text := answer.feed(block[at : at + PIECE_BYTES]):
                            reader.hear(text)
                    if answer.end is not None and not reader.finished:
                        reader.finish()
                if session is self._kept and answer.error is None:
                    self._note_warm()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            stale = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientPayloadError)
            raise RetryableError(f"connection failed ({type(error).__name__})", Action.RETRY, at_once=stale) from None
        except aiohttp.ClientError as error:
            raise RetryableError(f"an answer that is not HTTP ({type(error).__name__})", Action.FAIL) from None

    async def _read_error(self, response: aiohttp.ClientResponse, model: Model) -> RetryableError:
        """Read the body of a refusal, as far as it comes soon."""
        body, content = b"", None
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(TAIL_SECONDS if is_plain(response) else 0):
                while len(body) < MAX_ERROR_BYTES and (block := await response.content.readany()):
                    body += block
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(body.decode())
        pause = parse_retry_after(response.headers.get("Retry-After"), time.time())
        return self.error_of(response.status, content, model, pause)


def timeout_error(reader: ReplyReader, now: float, first_text_by: float, latest: float) -> RetryableError:
    """Name the limit that has passed; all times are loop times."""
    if now >= latest:
        return RetryableError("REPLY_TIMEOUT_SECONDS passed", Action.FAIL)
    if not reader.spoke and now >= first_text_by:
        return RetryableError("FIRST_CHUNK_TIMEOUT_SECONDS passed", Action.FAIL)
    return RetryableError("CHUNK_TIMEOUT_SECONDS passed", Action.RETRY_OR_FALLBACK)


def is_plain(response: aiohttp.ClientResponse) -> bool:
    return response.headers.get("Content-Encoding", "identity").lower() == "identity"


async def drain(response: aiohttp.ClientResponse) -> None:
    """Read a body to its end, and keep nothing of it."""
    while await response.content.readany():
        pass


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None
