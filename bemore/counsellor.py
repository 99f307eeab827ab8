"""What a counsellor is asked, how it replies, and how a reply fails."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Self


class Emotion(StrEnum):
    HAPPY = "happy"
    SAD = "sad"
    ANGRY = "angry"
    ANXIOUS = "anxious"
    NEUTRAL = "neutral"
    SURPRISED = "surprised"
    DISGUSTED = "disgusted"
    FEARFUL = "fearful"


@dataclass(frozen=True, slots=True)
class PastTurn:
    """A stored turn: what the person said and what the counsellor replied."""

    id: int
    user_message: str
    ai_response: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to a counsellor: the system prompt, the person's message, and the past turns, oldest first."""

    instruction: str
    message: str
    history: Sequence[PastTurn] = ()
    # The two fields below are for the demo counsellor; for a model the instruction says what follows from them.
    emotion: Emotion | None = None
    at_risk: bool = False


class Notice(Enum):
    """A risk that the model sees in the conversation: it tells the server, which answers with a helpline sentence."""

    SELF = "self"  # the person may harm themselves
    OTHERS = "others"  # the person may harm somebody else


Say = Callable[[str | Notice], None]

# What the system prompt asks the model to write for each notice. No reply contains these by chance.
MARKERS = {"[[위험]]": Notice.SELF, "[[위협]]": Notice.OTHERS}
MARKER = re.compile("|".join(map(re.escape, MARKERS)))
# Finds the longest end of a text that may be the beginning of a marker; it is empty if there is none.
_BEGINNINGS = (re.escape(marker[:size]) for marker in MARKERS for size in range(1, len(marker)))
BEGINNING = re.compile(f"(?:{'|'.join(_BEGINNINGS)})?\\Z")


class MarkerFilter:
    """Replaces markers by notices in a text that arrives in pieces; text that cannot begin a marker is not delayed."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[str | Notice]:
        """Return the text and the notices that are certain so far."""
        # All markers begin with this character, and hardly any text contains it.
        if not self._held and "[" not in text:
            return [text]
        text = self._held + text
        pieces: list[str | Notice] = []
        at = 0
        for found in MARKER.finditer(text):
            pieces += [text[at : found.start()], MARKERS[found[0]]]
            at = found.end()
        beginning = BEGINNING.search(text, at)
        assert beginning is not None
        self._held = beginning[0]
        return [piece for piece in (*pieces, text[at : beginning.start()]) if piece]

    def rest(self) -> str:
        """Return what is still held when the reply ends, unless two brackets show that it is a broken marker."""
        held, self._held = self._held, ""
        return "" if held.startswith("[[") else held


class CounsellorError(Exception):
    """A reply is incomplete."""


class Failed(CounsellorError):
    """The model failed. `cause` is for the log: it contains no conversation, no key, and no text of a library."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Blocked(CounsellorError):
    """The model's safety filter blocked the person's message or the rest of the reply."""


class Counsellor(ABC):
    """A context manager that owns its connections and streams one reply for each prompt."""

    # The model's name for people to read, in the start line, /health and the page.
    name: str
    # "demo", "gemini" or "openai".
    kind: str

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def prepare(self) -> None:  # noqa: B027 - optional for subclasses
        """Get ready for a request without waiting: a client has connected."""

    @abstractmethod
    async def reply(self, prompt: Prompt, say: Say) -> None:
        """Pass the reply to `say` piece by piece; raise Failed or Blocked if it is incomplete.

        An exception from `say` ends the reply.
        """
