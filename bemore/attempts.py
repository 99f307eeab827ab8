"""One reply over several requests to a model: retries, the fallback model, a continuation, and time limits.

This module knows no wire format and does no I/O; bemore/model_client.py sends the requests.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from bemore.counsellor import Failed, MarkerFilter, Notice, Prompt, Say

logger = logging.getLogger("bemore_voice")

# With a fallback model, the main model is asked this often.
ATTEMPTS_BEFORE_FALLBACK = 3
# Pauses before a retry, in seconds: the first, the longest, and the shortest for which a retry is worthwhile.
FIRST_PAUSE, LONGEST_PAUSE, SHORTEST_PAUSE = 0.4, 3.0, 0.1
# A finished reply may still end in these seconds: proxies put a finish reason into every event, and a connection can be
# kept only if its response was read to the end.
TAIL_SECONDS = 0.5

# The two texts below ask for the rest of a reply from its last word on, since a word may have broken in its middle.
CONTINUE = """\
(앱에서 알려 드립니다. 통신이 끊겨 당신의 답이 도중에 멈췄고, 상대는 바로 위에 적힌 데까지만 들었습니다. 인사나 사과, \
설명 없이 하던 말을 이어서 마쳐 주세요. 끊긴 자리의 마지막 어절부터 다시 적어 자연스럽게 이어 가고, 그보다 앞의 말은 \
되풀이하지 마세요. 더 할 말이 없다면 마지막 어절만 적어 주세요.)"""
FINISH_SENTENCE = """\
(앱에서 알려 드립니다. 답이 길어져 당신의 말이 문장 도중에 멈췄고, 상대는 바로 위에 적힌 데까지만 들었습니다. 인사나 \
사과, 설명 없이 멈춘 자리의 마지막 어절부터 다시 적어 그 문장만 짧게 끝맺어 주세요. 그보다 앞의 말은 되풀이하지 말고, \
새로운 문장은 시작하지 마세요.)"""
SENTENCE_END = re.compile(r"[.!?…~。][\"'”’)\]]*\s*\Z")
# No space is put before these.
CLOSING = ".,!?…~)]”’"


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """All in seconds: until the first text, between two pieces of text, and for the whole reply."""

    first_chunk: float
    chunk: float
    reply: float


@dataclass(frozen=True, slots=True)
class Model:
    # The setting that names the model, for the log.
    setting: str
    name: str


class Action(Enum):
    """What may follow a request that brought no text."""

    # The same model is asked again until the time for the first text is used up.
    RETRY = "retry"
    # The same, but if there is a fallback model, it is asked after three attempts.
    RETRY_OR_FALLBACK = "retry or fallback"
    # The fallback model is asked at once; without one the reply fails.
    FALLBACK = "fallback"
    # The request is repeated at once without its optional parameters.
    REPEAT_WITHOUT_OPTIONS = "repeat without options"
    # The reply fails: only the operator can help.
    FAIL = "fail"


RETRIED = (Action.RETRY, Action.RETRY_OR_FALLBACK)


class RetryableError(Exception):
    """A request did not bring a whole reply. If there was text, the reply is continued; else `action` follows.

    `cause` is for the log, under the same rule as that of Failed.
    """

    def __init__(
        self,
        cause: str,
        action: Action,
        *,
        pause: float | None = None,
        at_once: bool = False,
        sentence_open: bool = False,
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.action = action
        # Seconds that the server asked for.
        self.pause = pause
        # The server had closed a kept connection, so the request has probably never arrived.
        self.at_once = at_once
        # The reply ran out of tokens inside a sentence.
        self.sentence_open = sentence_open
        # The reply can end here if it cannot be continued.
        self.may_end = sentence_open


def conversation(prompt: Prompt, said: str = "", request_for_rest: str = "") -> list[str]:
    """Return the texts of a request: the person's and the counsellor's in turn, first and last the person's.

    If `said` is set, `request_for_rest` asks for the rest of that reply.
    """
    texts = [text for turn in prompt.history for text in (turn.user_message, turn.ai_response)]
    # Models refuse to go on after a text of their own, so the request for the rest is a person's text.
    return [*texts, prompt.message, *((said, request_for_rest) if said else ())]


class RetryPlan:
    """Decides what follows a failed request: the same again, the fallback model, the rest of the reply, or the end."""

    def __init__(self, label: str, models: Sequence[Model]) -> None:
        self.model, *self._fallbacks = models
        # Asks for the rest of the reply; empty while a whole reply is asked for.
        self.request_for_rest = ""
        # Only the first request may take a kept connection.
        self.first = True
        self._label = label
        self._attempt = 1
        self._on_fallback = self._may_end = False

    def after(self, error: RetryableError, said: str, left: float) -> float | None:
        """Return the seconds until the next request, None if the reply ends as it is; raise Failed if it fails.

        `left` is the number of seconds within which the first text must come.
        """
        first, self.first = self.first, False
        if self.request_for_rest:
            if error.may_end or self._may_end:
                return None
            raise Failed(f"{self._label}: {error.cause}, for the rest of a reply that broke off")
        if said:
            self.request_for_rest = FINISH_SENTENCE if error.sentence_open else CONTINUE
            self._may_end = error.may_end
            logger.warning("%s: %s: asking for the rest of the reply", self._label, error.cause)
            return 0
        if error.action is Action.REPEAT_WITHOUT_OPTIONS or (first and error.at_once):
            return 0
        return self._next_attempt(error, left)

    def _next_attempt(self, error: RetryableError, left: float) -> float:
        pause = self._pause(error, left)
        cause = f"{self._label}: {error.cause}" + (f", attempt {self._attempt}" if error.action in RETRIED else "")
        self._attempt += 1
        if pause is not None:
            return pause
        if not self._fallbacks or error.action not in (Action.FALLBACK, Action.RETRY_OR_FALLBACK):
            raise Failed(cause)
        self.model, self._on_fallback = self._fallbacks.pop(), True
        logger.warning("%s: asking %s", cause, self.model.setting)
        return 0

    def _pause(self, error: RetryableError, left: float) -> float | None:
        """Return the seconds until the same model is asked again, or None if it is not."""
        if self._on_fallback or error.action not in RETRIED:
            return None
        enough = self._fallbacks and self._attempt >= ATTEMPTS_BEFORE_FALLBACK
        if enough and error.action is Action.RETRY_OR_FALLBACK:
            return None
        pause = min(FIRST_PAUSE * 2.0 ** (self._attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1)
        if error.pause is not None:
            pause = max(pause, error.pause)
            return pause if pause < left else None
        # Near the end of the time the pauses shrink, so that all of it is used.
        pause = min(pause, left / 2)
        return pause if pause >= SHORTEST_PAUSE else None


class ContinuationJoiner:
    """Joins the rest of a reply to what was said before it broke off: no word twice, and a space between.

    The rest repeats the last word, or more of what was said; it is held back until it differs.
    """

    def __init__(self, said: str) -> None:
        # Empty once the two are joined.
        self._said = said
        self._held = ""

    def feed(self, text: str) -> str:
        """Return what can be said so far."""
        if not self._said:
            return text
        self._held += text
        words, again = self._said.rstrip(), self._held.lstrip()
        if any(words.startswith(again, word.start()) for word in re.finditer(r"\S+", words)):
            return ""
        return self.rest()

    def rest(self) -> str:
        """Return what was held back, without what was said already."""
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


TAG = re.compile("</?think>")
TAG_BEGINNING = re.compile(r"(?:<(?:/?(?:t(?:h(?:i(?:nk?)?)?)?)?)?)?\Z")


class ThinkFilter:
    """Removes `<think>` blocks, in which local models write their reasoning, from a text that arrives in pieces."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = False

    def feed(self, text: str) -> str:
        """Return the text that is certainly outside of a block."""
        # Hardly any text contains this character.
        if not self._held and not self._inside and "<" not in text:
            return text
        text = self._held + text
        shown, at = "", 0
        for tag in TAG.finditer(text):
            shown += "" if self._inside else text[at : tag.start()]
            self._inside, at = tag[0] == "<think>", tag.end()
        beginning = TAG_BEGINNING.search(text, at)
        assert beginning is not None
        self._held = beginning[0]
        return shown if self._inside else shown + text[at : beginning.start()]

    def rest(self) -> str:
        """Return what is still held when the reply ends, unless a letter shows that it is a broken tag."""
        held, self._held = self._held, ""
        return held if held == "<" and not self._inside else ""


class ReplyReader:
    """Passes on the text of one request: without reasoning and markers, joined to what was said before, and in time.

    `end_at` sets the loop time at which the request ends: it ends when no text comes for `patience` seconds or a tenth
    more, and at `latest`.
    """

    def __init__(self, said: str, say: Say, end_at: Callable[[float], None], patience: float, latest: float) -> None:
        # Whether this request has brought text, a marker, and a finish reason.
        self.spoke = self.noticed = self.finished = False
        self._said = [said]
        # White space before the first word; a reply of nothing else counts as no text.
        self._blank = ""
        self._say = say
        self._end_at = end_at
        self._patience, self._latest = patience, latest
        self._ends = 0.0
        self._think, self._marker, self._joiner = ThinkFilter(), MarkerFilter(), ContinuationJoiner(said)

    @property
    def said(self) -> str:
        """All that was said so far; what the filters still hold is not, and comes again with the rest."""
        return "".join(self._said)

    def hear(self, text: str) -> None:
        """Pass on a piece of text, and allow more time for the next one."""
        if text := self._think.feed(text):
            now = asyncio.get_running_loop().time()
            # Rescheduling at each chunk would cost a twelfth of a chunk, so the limit is moved when it comes near.
            if self._ends < self._latest and self._ends < now + self._patience:
                self._extend(now, 1.1 * self._patience)
            self._tell(text)

    def hear_last(self, text: str) -> None:
        """Pass on a piece of text after the time limit has ended."""
        self._tell(self._think.feed(text))

    def finish(self) -> None:
        """Note that the request has brought a finish reason: only text that comes soon still belongs to the reply."""
        self.finished = True
        self._patience = TAIL_SECONDS
        self._extend(asyncio.get_running_loop().time(), TAIL_SECONDS)

    def end(self) -> None:
        """Pass on what is still held: the reply is whole."""
        self._tell(self._think.rest())
        self._pass_on(self._joiner.feed(self._marker.rest()) + self._joiner.rest())

    def _extend(self, now: float, seconds: float) -> None:
        self._ends = min(now + seconds, self._latest)
        self._end_at(self._ends)

    def _tell(self, text: str) -> None:
        for piece in self._marker.feed(text):
            if isinstance(piece, Notice):
                self.noticed = True
                self._say(piece)
            else:
                self._pass_on(self._joiner.feed(piece))

    def _pass_on(self, words: str) -> None:
        if not self.spoke:
            words, self._blank = self._blank + words, ""
            if not words.strip():
                self._blank = words
                return
            self.spoke = True
        if words:
            self._said.append(words)
            self._say(words)
