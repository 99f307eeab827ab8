"""The JSON of Gemini's generateContent, without I/O; see https://ai.google.dev/api/generate-content."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from bemore.event_stream import End, Event, status_of

# https://ai.google.dev/api/generate-content#FinishReason. All others end an answer that has text; without text they
# count as no answer.
ENDS: dict[str | None, End | None] = {
    None: None,
    "": None,
    "FINISH_REASON_UNSPECIFIED": None,
    "MAX_TOKENS": End.TOKENS,
    **dict.fromkeys(("SAFETY", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"), End.BLOCKED),
}


def request_body(instruction: str, texts: Sequence[str], max_output_tokens: int, thinking_level: str) -> object:
    """Return the body of a request; `texts` are the person's and the model's in turn."""
    generation: dict[str, object] = {"maxOutputTokens": max_output_tokens}
    if thinking_level:
        generation["thinkingConfig"] = {"thinkingLevel": thinking_level}
    roles = itertools.cycle(("user", "model"))
    return {
        "systemInstruction": {"parts": [{"text": instruction}]},
        "contents": [{"role": role, "parts": [{"text": text}]} for role, text in zip(roles, texts, strict=False)],
        "generationConfig": generation,
    }


def read_event(event: Any) -> Event:
    """Read one event of an answer, without thoughts and parts that are no text."""
    if event.get("error") is not None:
        return Event(status=status_of(event["error"]))
    if (event.get("promptFeedback") or {}).get("blockReason"):
        return Event(end=End.BLOCKED)
    candidate = (event.get("candidates") or [{}])[0]
    text = ""
    for part in (candidate.get("content") or {}).get("parts") or ():
        if not part.get("thought"):
            text += part.get("text") or ""
    return Event(text, ENDS.get(candidate.get("finishReason"), End.COMPLETE))
