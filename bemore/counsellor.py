"""Who answers: what a counsellor is asked, how it answers, and how it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
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
class Turn:
    """What a person said, and what they were answered."""

    id: int
    user_message: str
    ai_response: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a counsellor is asked: its instruction, the person's words, and the turns before, oldest first."""

    instruction: str
    message: str
    history: Sequence[Turn] = ()
    emotion: Emotion | None = None  # a signal beside the words; the instruction says what follows
    at_risk: bool = False  # has spoken of suicide or self-harm, now or earlier in the session


class Notice(Enum):
    """What a counsellor tells the server, and no person."""

    RISK = "risk"  # the person's words, in the light of the whole conversation, hold a sign that needs a helpline


# What a model is asked to write for Notice.RISK: nobody would say it.
RISK_MARKER = "[[109]]"


class MarkerFilter:
    """Takes the marker out of a text that comes in pieces, and holds back nothing that cannot begin one."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[str | Notice]:
        """Return what can be told so far: text without the marker, and the notice in its place."""
        if not self._held and RISK_MARKER[0] not in text:
            return [text]  # nearly always
        *before, last = (self._held + text).split(RISK_MARKER)
        held = next(size for size in range(len(RISK_MARKER) - 1, -1, -1) if last.endswith(RISK_MARKER[:size]))
        self._held = last[len(last) - held :]
        pieces: list[str | Notice] = []
        for piece in before:
            pieces += [piece, Notice.RISK]
        return [piece for piece in (*pieces, last[: len(last) - held]) if piece]

    def rest(self) -> str:
        """Return what was held back, once no more comes."""
        held, self._held = self._held, ""
        return held


class CounsellorError(Exception):
    """A reply cannot be had whole."""


class Failed(CounsellorError):
    """The model failed; `cause` is for the log, and never holds what anyone said, a key, or a library's own words."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Blocked(CounsellorError):
    """The model's safety filter held back the person's words, or the rest of its own."""


class Counsellor(ABC):
    """A context manager that holds its connections, and one stream of text for each prompt."""

    name: str  # of whoever answers, for people to read

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def prepare(self) -> None:  # noqa: B027 - most have nothing to get ready
        """Get ready, without waiting: somebody has come, and is about to speak."""

    @abstractmethod
    def reply(self, prompt: Prompt) -> AsyncGenerator[str | Notice, None]:
        """Yield the reply in pieces as they are written; raise Failed or Blocked where it cannot be had whole."""
