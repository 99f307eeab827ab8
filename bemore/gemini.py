"""Google's Gemini over REST.

What follows a failed request:

| failure | before any text | after text |
|---|---|---|
| connection refused or broken, status 408 | retried | continued |
| 429, 5xx, as a status or as an error event in a stream | retried, then fallback | continued |
| no finish reason, an event that is not JSON or has another shape | retried, then fallback | continued |
| a finish reason, but no text: STOP, MAX_TOKENS, RECITATION, LANGUAGE, OTHER ... | retried, then fallback | complete |
| MAX_TOKENS inside a sentence | | continued to a short end |
| 429: the day's quota is used up, or is 0; 404 | fallback | continued |
| 400: the thinking level is refused | repeated without it | |
| any other status; over 2 MiB without text; an encoded body | final | continued |
| CHUNK_TIMEOUT_SECONDS passed | | continued |
| FIRST_CHUNK_TIMEOUT_SECONDS passed | final | |
| REPLY_TIMEOUT_SECONDS passed | final | cut and complete |
| SAFETY, BLOCKLIST, PROHIBITED_CONTENT, SPII, a blockReason | prepared reply | prepared reply |

"Retried" ends when FIRST_CHUNK_TIMEOUT_SECONDS is used up, or at once if the server asks for a longer pause; with a
fallback model it ends after three attempts (a connection or a 408 is never a reason for the fallback). The fallback is
asked once. "Continued" happens once; if the rest fails too, the reply fails, unless a finish reason had been there.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from bemore.attempts import Action, Model, TimeLimits
from bemore.gemini_stream import read_event, request_body
from bemore.model_client import KEEPALIVE_SECONDS, ModelClient, Rule

SERVER_ERRORS = range(500, 600)
# The first rule that fits counts. {setting} is the setting that names the model.
RULES = (
    Rule({400}, "(?i)API_KEY_INVALID|API key (not|expired)", Action.FAIL, "GEMINI_API_KEY is not a valid key"),
    Rule(
        {400},
        "FAILED_PRECONDITION|location is not supported",
        Action.FAIL,
        "Google does not serve the region of this server, or not without billing: enable billing for the project of "
        "GEMINI_API_KEY, or run the server elsewhere",
    ),
    Rule(
        {400},
        "(?i)thinking",
        Action.REPEAT_WITHOUT_OPTIONS,
        "{setting} does not take this GEMINI_THINKING_LEVEL: asking without it, change or empty the setting",
    ),
    Rule(
        {400},
        "",
        Action.FAIL,
        "check GEMINI_API_KEY, and whether {setting} takes GEMINI_THINKING_LEVEL and GEMINI_MAX_OUTPUT_TOKENS",
    ),
    Rule({401}, "", Action.FAIL, "check GEMINI_API_KEY"),
    Rule(
        {402, 429},
        "(?i)prepa(id|y)|spending cap|PAYMENT_REQUIRED",
        Action.FAIL,
        "no prepaid credit is left for GEMINI_API_KEY, or its spending cap is reached",
    ),
    Rule({402}, "", Action.FAIL, "the project of GEMINI_API_KEY has no credit or no billing"),
    Rule(
        {403},
        "API_KEY_[A-Z_]+_BLOCKED",
        Action.FAIL,
        "GEMINI_API_KEY is restricted: it must allow the Generative Language API and this server",
    ),
    Rule(
        {403},
        "SERVICE_DISABLED|has not been used in project",
        Action.FAIL,
        "the project of GEMINI_API_KEY has not enabled the Generative Language API: take a key of another project",
    ),
    Rule({403}, "", Action.FAIL, "check GEMINI_API_KEY and what its project may use"),
    Rule({404}, "", Action.FALLBACK, "{setting} is unknown or retired, or GEMINI_BASE_URL is wrong: check both"),
    Rule({408}, "", Action.RETRY),
    Rule(
        {429},
        r'limit: 0\b|"quotaValue": "0"',
        Action.FALLBACK,
        "the quota for {setting} is 0: it needs billing in the project of GEMINI_API_KEY",
    ),
    Rule({429}, "PerDay", Action.FALLBACK, "the day's quota of GEMINI_API_KEY for {setting} is used up"),
    Rule({429}, "", Action.RETRY_OR_FALLBACK, "the quota of GEMINI_API_KEY for {setting} is used up for now"),
    Rule(SERVER_ERRORS, "", Action.RETRY_OR_FALLBACK),
    Rule(range(1000), "", Action.FAIL, "expected status 200: check GEMINI_BASE_URL"),
)


class Gemini(ModelClient):
    """A client of streamGenerateContent; the fallback model gets no thinking level, which it may not know."""

    kind = "gemini"
    label = "Gemini"
    tokens_hint = "raise GEMINI_MAX_OUTPUT_TOKENS or lower GEMINI_THINKING_LEVEL"
    rules = RULES
    read_event = staticmethod(read_event)

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str,
        model: str,
        fallback_model: str = "",
        max_output_tokens: int,
        thinking_level: str,
        limits: TimeLimits,
        keepalive: float = KEEPALIVE_SECONDS,
    ) -> None:
        models = [Model("GEMINI_MODEL", model)]
        if fallback_model:
            models.append(Model("GEMINI_FALLBACK_MODEL", fallback_model))
        super().__init__(models, {"x-goog-api-key": api_key}, limits, keepalive)
        self._base_url = base_url
        self._max_output_tokens = max_output_tokens
        self._thinking_level = thinking_level

    def request(self, model: Model, instruction: str, texts: Sequence[str], options: bool) -> tuple[str, object]:
        level = self._thinking_level if options else ""
        body = request_body(instruction, texts, self._max_output_tokens, level)
        return f"{self._url(model)}:streamGenerateContent?alt=sse", body

    def probes(self) -> list[tuple[Model, str]]:
        return [(model, self._url(model)) for model in self.models]

    def _url(self, model: Model) -> str:
        return f"{self._base_url}/models/{quote(model.name)}"
