"""Who answers: what a counsellor is asked, how it answers, and how it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import StrEnum
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
    emotion: Emotion | None = None  # in the face; the instruction says what follows from it
    at_risk: bool = False  # has spoken of suicide or self-harm, now or earlier in the session


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

    name: str  # a model's, for people to read

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def prepare(self) -> None:  # noqa: B027 - most have nothing to get ready
        """Get ready, without waiting: somebody has come, and is about to speak."""

    @abstractmethod
    def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        """Yield the reply in pieces as they are written; raise Failed or Blocked where it cannot be had whole."""
