"""Any server that speaks OpenAI's chat completions as a stream: a local model, or a proxy.

See https://platform.openai.com/docs/api-reference/chat-streaming. What follows a failed request is the same as in the
table of bemore/gemini.py; there is no fallback model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from bemore.attempts import Action, Model, TimeLimits
from bemore.event_stream import End, Event, status_of
from bemore.model_client import KEEPALIVE_SECONDS, ModelClient, Rule

# All other finish reasons end an answer that has text; without text they count as no answer.
ENDS: dict[str | None, End | None] = {None: None, "": None, "length": End.TOKENS, "content_filter": End.BLOCKED}
# The first rule that fits counts.
RULES = (
    Rule(
        {400},
        "max_completion_tokens",
        Action.REPEAT_WITHOUT_OPTIONS,
        "OPENAI_MODEL does not take max_tokens: sending max_completion_tokens from now on",
    ),
    Rule(
        {400, 422},
        "",
        Action.FAIL,
        "check OPENAI_API_KEY, and whether OPENAI_MODEL is a chat model with room for the prompt",
    ),
    Rule({401, 403}, "", Action.FAIL, "check OPENAI_API_KEY and what it may use"),
    Rule({402, 429}, "insufficient_quota|PAYMENT_REQUIRED", Action.FAIL, "no credit is left for OPENAI_API_KEY"),
    Rule({402}, "", Action.FAIL, "no credit is left for OPENAI_API_KEY"),
    Rule(
        {404},
        "",
        Action.FAIL,
        "OPENAI_BASE_URL does not know OPENAI_MODEL, or is wrong: it mostly ends with /v1",
    ),
    Rule({408, 409, 425, 429, *range(500, 600)}, "", Action.RETRY),
    Rule(range(1000), "", Action.FAIL, "expected status 200: check OPENAI_BASE_URL"),
)


def request_body(model: str, instruction: str, texts: Sequence[str], **limit: int) -> object:
    """Return the body of a request; `texts` are the person's and the model's in turn."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": model, "messages": [{"role": "system", "content": instruction}, *turns], "stream": True, **limit}


def read_event(event: Any) -> Event:
    """Read one event of an answer: its content, without reasoning_content."""
    if event.get("error") is not None or event.get("object") == "error":
        return Event(status=status_of(event.get("error") or event))
    # An event about usage has no choices.
    choice = (event.get("choices") or [{}])[0]
    # A server that does not stream sends one whole message.
    delta = choice.get("delta") or choice.get("message") or {}
    if delta.get("refusal"):
        return Event(end=End.BLOCKED)
    # Adding raises TypeError for anything but a text.
    return Event("" + (delta.get("content") or ""), ENDS.get(choice.get("finish_reason"), End.COMPLETE))


class OpenAI(ModelClient):
    """A client of a chat completions server."""

    kind = "openai"
    label = "Model server"
    tokens_hint = "raise GEMINI_MAX_OUTPUT_TOKENS, which counts for OPENAI_MODEL too, or let it think less"
    rules = RULES
    read_event = staticmethod(read_event)

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str,
        model: str,
        max_output_tokens: int,
        limits: TimeLimits,
        keepalive: float = KEEPALIVE_SECONDS,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        super().__init__([Model("OPENAI_MODEL", model)], headers, limits, keepalive)
        self._base_url = base_url
        self._max_output_tokens = max_output_tokens

    def request(self, model: Model, instruction: str, texts: Sequence[str], options: bool) -> tuple[str, object]:
        # Local servers know the older name, OpenAI's newer models only the other one.
        limit = {"max_tokens" if options else "max_completion_tokens": self._max_output_tokens}
        return f"{self._base_url}/chat/completions", request_body(model.name, instruction, texts, **limit)

    def probes(self) -> list[tuple[Model, str]]:
        return [(model, f"{self._base_url}/models") for model in self.models]
