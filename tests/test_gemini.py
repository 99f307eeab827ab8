"""Gemini over REST, against a local server that speaks its SSE, with google-genai as the oracle."""

import asyncio
import json
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web
from google import genai
from google.genai import types
from standin import Answer, GeminiStandIn, event, reset_after, silent_after, status, stream
from tools import until

from bemore.attempts import CONTINUE, FINISH_SENTENCE, TimeLimits
from bemore.counsellor import MARKERS, Blocked, Failed, Notice, PastTurn, Prompt
from bemore.gemini import Gemini
from bemore.model_client import parse_retry_after

RISK_MARKER = next(iter(MARKERS))
LIMITS = {"first_chunk": 15.0, "chunk": 10.0, "reply": 60.0}
KEY = "a-key-that-nobody-may-see"
PROMPT = Prompt("따뜻하게 답하세요.", "요즘 잠이 안 와요", [PastTurn(n, f"말 {n}", f"답 {n}") for n in range(10)])


def client_for(base_url: str, **options: Any) -> Gemini:
    values: dict[str, Any] = {
        "api_key": KEY,
        "model": "m-1",
        "max_output_tokens": 200,
        "thinking_level": "minimal",
    }
    limits = TimeLimits(*(options.pop(f"{name}_timeout", seconds) for name, seconds in LIMITS.items()))
    return Gemini(base_url=base_url, limits=limits, **{**values, **options})


@pytest.fixture
async def model(gemini: GeminiStandIn) -> AsyncIterator[Gemini]:
    async with client_for(f"{gemini.url}/v1beta") as opened:
        yield opened


@pytest.fixture
async def models(gemini: GeminiStandIn) -> AsyncIterator[Gemini]:
    async with client_for(gemini.url, fallback_model="m-2") as opened:
        yield opened


def asked(gemini: GeminiStandIn) -> list[str]:
    """The models that were asked, in turn."""
    return [request["path"].removeprefix("/models/").partition(":")[0] for request in gemini.requests]


async def read(model: Gemini, prompt: Prompt = PROMPT) -> list[str]:
    texts: list[str | Notice] = []
    await model.reply(prompt, texts.append)
    return [str(text) for text in texts]


async def failure_of(model: Gemini) -> tuple[list[str], Failed]:
    texts: list[str | Notice] = []
    with pytest.raises(Failed) as caught:
        await model.reply(PROMPT, texts.append)
    assert KEY not in repr(caught.value)
    return [str(text) for text in texts], caught.value


async def test_the_request_is_what_the_interface_takes(gemini: GeminiStandIn, model: Gemini) -> None:
    assert "".join(await read(model)) == "네, 듣고 있어요."
    (request,) = gemini.requests
    assert request["path"] == "/v1beta/models/m-1:streamGenerateContent"
    assert request["query"] == {"alt": "sse"}
    assert request["headers"]["x-goog-api-key"] == KEY
    assert KEY not in json.dumps(request["body"]) + str(request["query"])
    body = request["body"]
    assert body["systemInstruction"]["parts"] == [{"text": PROMPT.instruction}]
    assert body["generationConfig"] == {"maxOutputTokens": 200, "thinkingConfig": {"thinkingLevel": "minimal"}}
    assert [content["role"] for content in body["contents"]] == ["user", "model"] * 10 + ["user"]
    assert [content["parts"] for content in body["contents"][-3:]] == [
        [{"text": "말 9"}],
        [{"text": "답 9"}],
        [{"text": "요즘 잠이 안 와요"}],
    ]
    assert set(body) == {"systemInstruction", "contents", "generationConfig"}


async def test_an_empty_thinking_level_is_not_sent(gemini: GeminiStandIn) -> None:
    async with client_for(gemini.url, thinking_level="", max_output_tokens=77) as model:
        await read(model)
    assert gemini.requests[0]["body"]["generationConfig"] == {"maxOutputTokens": 77}


@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession")
async def test_google_genai_sends_the_same_and_reads_the_same(gemini: GeminiStandIn, model: Gemini) -> None:
    """The oracle: Google's own client, given the same conversation and the same answer."""
    gemini.default = stream(
        event("첫 조각, "),
        b'data: {"candidates": [{"content": {"parts": [{"text": "a thought", "thought": true}]}}]}\r\n\r\n',
        event("둘째 조각 😥"),
        event("", "STOP", usageMetadata={"totalTokenCount": 9}),
    )
    ours = "".join(await read(model))
    contents = []
    for turn in PROMPT.history:
        contents.append(types.Content(role="user", parts=[types.Part(text=turn.user_message)]))
        contents.append(types.Content(role="model", parts=[types.Part(text=turn.ai_response)]))
    contents.append(types.Content(role="user", parts=[types.Part(text=PROMPT.message)]))
    client = genai.Client(api_key=KEY, http_options=types.HttpOptions(base_url=gemini.url, api_version="v1beta"))
    async with client.aio as oracle:
        theirs = ""
        async for chunk in await oracle.models.generate_content_stream(
            model="m-1",
            contents=contents,
            config=types.GenerateContentConfig(
                system_instruction=PROMPT.instruction,
                max_output_tokens=200,
                thinking_config=types.ThinkingConfig(thinking_level=types.ThinkingLevel.MINIMAL),
            ),
        ):
            theirs += chunk.text or ""
    client.close()
    assert ours == theirs == "첫 조각, 둘째 조각 😥"
    our, their = gemini.requests
    assert (our["path"], our["query"]) == (their["path"], their["query"])
    assert our["body"]["contents"] == their["body"]["contents"]
    assert our["body"]["systemInstruction"]["parts"] == their["body"]["systemInstruction"]["parts"]
    ours_config, theirs_config = our["body"]["generationConfig"], their["body"]["generationConfig"]
    assert ours_config["maxOutputTokens"] == theirs_config["maxOutputTokens"]
    level = theirs_config["thinkingConfig"].get("thinkingLevel") or theirs_config["thinkingConfig"]["thinking_level"]
    assert ours_config["thinkingConfig"]["thinkingLevel"] == level.lower()


# The shapes of a stream


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "unheard-of"])
async def test_no_encoding_but_identity_is_read(gemini: GeminiStandIn, model: Gemini, encoding: str) -> None:
    """A few compressed bytes may stand for gigabytes; an answer in another encoding is not read at all."""
    gemini.answers.append(silent_after(headers={"Content-Encoding": encoding}))
    _, failure = await failure_of(model)
    assert "Content-Encoding" in failure.cause
    assert gemini.requests[0]["headers"]["Accept-Encoding"] == "identity"
    gemini.answers.append(stream(event("가", "STOP"), headers={"Content-Encoding": "identity"}))
    assert await read(model) == ["가"]


# Failures before any text


def error(code: int, message: str = "", reason: str = "", **details: Any) -> dict[str, Any]:
    """The body of an error as Gemini writes it."""
    listed: list[dict[str, object]] = (
        [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason}] if reason else []
    )
    found: dict[str, Any] = {"code": code, "message": message, "details": [*listed, *([details] if details else [])]}
    return {"error": found}


def refusal(number: int, message: str = "", **details: Any) -> Answer:
    return status(number, json.dumps(error(number, message, **details)))


def error_event(code: int) -> bytes:
    return b"data: " + json.dumps(error(code)).encode() + b"\n\n"


THOUGHT = (
    b'data: {"candidates": [{"content": {"parts": [{"text": "hm", "thought": true}]}, "finishReason": "STOP"}]}\n\n'
)
PASSING = {
    "408": status(408),
    "429": status(429),
    "503": status(503),
    "599": status(599),
    "a reset": reset_after(),
    "an error event 503": stream(error_event(503)),
    "an error event 429": stream(error_event(429)),
    "a bare error 500": stream(json.dumps(error(500), indent=2).encode()),
    "an empty stream": stream(),
    "HTML": stream(b"<html>a page</html>", headers={"Content-Type": "text/html"}),
    "STOP without text": stream(event(finish="STOP")),
    "thoughts alone": stream(THOUGHT),
    "OTHER without text": stream(event(finish="OTHER")),
    "an event that is not JSON": stream(b"data: {nonsense}\n\n"),
}


@pytest.mark.parametrize("failure", PASSING)
async def test_a_failure_that_may_pass_is_retried(gemini: GeminiStandIn, model: Gemini, failure: str) -> None:
    gemini.answers.append(PASSING[failure])
    assert "".join(await read(model)) == "네, 듣고 있어요."
    assert len(gemini.requests) == 2


async def test_a_refused_connection_is_retried_and_fails() -> None:
    async with client_for("http://127.0.0.1:9", first_chunk_timeout=1) as model:
        _, failure = await failure_of(model)
    assert failure.cause.startswith("Gemini: connection failed (ClientConnectorError), attempt ")
    # .invalid is reserved to be no name (RFC 2606).
    async with client_for("http://nobody.invalid", first_chunk_timeout=0.5) as model:
        _, failure = await failure_of(model)
    assert "ClientConnectorDNSError" in failure.cause


@pytest.mark.parametrize(
    "busy",
    [status(429, Retry_After="0.6"), refusal(429, retryDelay="0.7s"), refusal(503, "Please retry in 0.8s.")],
)
async def test_a_pause_that_is_asked_for_is_kept(gemini: GeminiStandIn, model: Gemini, busy: Answer) -> None:
    gemini.answers.append(busy)
    began = time.monotonic()
    await read(model)
    assert time.monotonic() - began >= 0.6
    assert len(gemini.requests) == 2


@pytest.mark.parametrize(
    "busy",
    [
        status(429, Retry_After="16"),
        status(503, Retry_After=formatdate(time.time() + 600, usegmt=True)),
        refusal(429, retryDelay="58.9s"),
    ],
)
async def test_a_pause_that_is_too_long_ends_the_attempts(gemini: GeminiStandIn, models: Gemini, busy: Answer) -> None:
    async with client_for(gemini.url) as model:
        gemini.answers.append(busy)
        await failure_of(model)
    assert len(gemini.requests) == 1
    gemini.answers.append(busy)
    assert "".join(await read(models)) == "네, 듣고 있어요."
    assert asked(gemini) == ["m-1", "m-1", "m-2"]


DAY = [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier", "quotaValue": "500"}]
# (status, the words of the error) and what the log line must name.
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "key invalid": (error(400, "API key not valid.", "API_KEY_INVALID"), "GEMINI_API_KEY is not a valid key"),
    "key expired": (error(400, "API key expired. Please renew the API key."), "GEMINI_API_KEY is not a valid key"),
    "region": (error(400, "User location is not supported for the API use."), "region of this server"),
    "bad request": (error(400, "Invalid JSON payload received."), "GEMINI_MAX_OUTPUT_TOKENS"),
    "unauthenticated": (error(401), "GEMINI_API_KEY"),
    "no prepaid credit": (error(402, "Your prepayment credits are depleted."), "credit is left for GEMINI_API_KEY"),
    "no prepaid credit, as 429": (error(429, "Your prepayment credits are depleted."), "no prepaid credit"),
    "key restricted": (error(403, "", "API_KEY_HTTP_REFERRER_BLOCKED"), "GEMINI_API_KEY is restricted"),
    "service blocked": (error(403, "", "API_KEY_SERVICE_BLOCKED"), "GEMINI_API_KEY is restricted"),
    "wrong project": (error(403, "", "SERVICE_DISABLED"), "project of GEMINI_API_KEY has not enabled"),
    "key leaked": (error(403, "Your API key was reported as leaked."), "check GEMINI_API_KEY"),
    "model unknown": (error(404, "models/m-1 is not found"), "GEMINI_MODEL is unknown or retired"),
    "quota zero": (error(429, "Quota exceeded for metric: x, limit: 0, model: m"), "quota for GEMINI_MODEL is 0"),
    "the day's quota": (error(429, violations=DAY, retryDelay="3s"), "day's quota of GEMINI_API_KEY"),
    "redirect": (error(302), "GEMINI_BASE_URL"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_an_operator_must_mend_is_not_retried_and_named(
    gemini: GeminiStandIn, model: Gemini, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    body, named = REFUSALS[name]
    answer = status(body["error"]["code"], json.dumps(body), Location="http://127.0.0.1:9/elsewhere")
    gemini.default = gemini.description = answer
    _, failure = await failure_of(model)
    assert named in failure.cause
    assert len(gemini.requests) == 1
    # The same is logged at the start, before anyone has spoken.
    await warm()
    caplog.clear()
    async with client_for(gemini.url):
        await until(lambda: caplog.messages)
    assert [message for message in caplog.messages if named in message]
    for words in (failure.cause, *caplog.messages):
        assert "\n" not in words
        assert body["error"]["message"] not in words or not body["error"]["message"]


async def test_a_refused_thinking_level_is_left_out_from_then_on(
    gemini: GeminiStandIn, model: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "thinkingConfig" in body["generationConfig"]:
            return await refusal(400, "Thinking level MINIMAL is not supported for this model.")(request)
        return await stream(event("가", "STOP"))(request)

    gemini.default = refuse
    assert [*await asyncio.gather(read(model), read(model))] == [["가"], ["가"]]
    assert await read(model) == ["가"]
    assert len(gemini.requests) == 5
    (line,) = [message for message in caplog.messages if "GEMINI_THINKING_LEVEL" in message]
    assert "GEMINI_MODEL does not take this GEMINI_THINKING_LEVEL" in line


async def test_a_level_that_was_not_sent_is_not_left_out_again(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.default = stream(b"data: " + json.dumps(error(400, "Thinking is not supported.")).encode() + b"\n\n")
    await failure_of(model)
    assert len(gemini.requests) == 2


def test_retry_after_is_a_number_or_a_date_or_nothing() -> None:
    now = 1_800_000_000.0
    assert parse_retry_after(None, now) is None
    assert parse_retry_after("soon", now) is None
    assert parse_retry_after("7", now) == 7
    assert parse_retry_after("0.5", now) == 0.5
    assert parse_retry_after(formatdate(now - 60, usegmt=True), now) == 0
    assert parse_retry_after(formatdate(now + 60, usegmt=True), now) == 60
    assert parse_retry_after("Mon, 01 Jan 2024 00:00:00 +99999999999999", now) is None


# Time limits


async def test_a_first_chunk_that_never_comes_is_not_tried_again(gemini: GeminiStandIn) -> None:
    gemini.answers.append(silent_after(b": nothing yet\n\n"))
    async with client_for(gemini.url, first_chunk_timeout=0.3) as model:
        _, failure = await failure_of(model)
        assert failure.cause == "Gemini: FIRST_CHUNK_TIMEOUT_SECONDS passed"
        await until(lambda: gemini.ended == 1)  # the stand-in has seen its connection close
        assert len(gemini.requests) == 1
        assert await read(model)


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(event("가"))
        await asyncio.sleep(0.05)


async def test_a_reply_that_speaks_for_too_long_is_cut_and_completes(gemini: GeminiStandIn) -> None:
    gemini.answers.append(drip)
    async with client_for(gemini.url, reply_timeout=0.5) as model:
        assert len(await read(model)) > 1
        await until(lambda: gemini.ended == 1)


async def test_the_rest_of_a_reply_comes_within_its_time(gemini: GeminiStandIn) -> None:
    gemini.answers.extend([stream(event("가")), silent_after()])
    async with client_for(gemini.url, reply_timeout=0.5) as model:
        _, failure = await failure_of(model)
    assert failure.cause.startswith("Gemini: REPLY_TIMEOUT_SECONDS passed")


async def test_a_finish_reason_ends_a_reply_whose_stream_stays_open(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.append(silent_after(event("가", "STOP")))
    began = time.monotonic()
    assert await read(model) == ["가"]
    # Not after CHUNK_TIMEOUT_SECONDS.
    assert time.monotonic() - began < 5
    gemini.answers.append(silent_after(event("가"), event(finish="SAFETY")))
    with pytest.raises(Blocked):
        await read(model)


async def test_keep_alive_lines_do_not_hold_up_a_finished_reply(gemini: GeminiStandIn, model: Gemini) -> None:
    async def keep_alive(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(event("가", "STOP"))
        while True:
            await asyncio.sleep(0.1)
            await response.write(b": keep-alive\n\n")

    gemini.answers.append(keep_alive)
    async with asyncio.timeout(5):
        assert await read(model) == ["가"]


async def test_a_marker_without_words_is_a_whole_reply(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.append(stream(event(RISK_MARKER, "STOP")))
    assert await read(model) == [str(Notice.SELF)]
    assert len(gemini.requests) == 1


async def test_text_after_an_early_finish_reason_belongs_to_the_reply(gemini: GeminiStandIn, model: Gemini) -> None:
    async def translating(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for text in ("가", "나", "다"):
            await response.write(event(text, "STOP"))
            await asyncio.sleep(0.05)
        return response

    gemini.answers.append(translating)
    assert await read(model) == ["가", "나", "다"]


async def test_a_reset_after_the_finish_reason_loses_nothing(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.append(reset_after(event("가", "STOP")))
    assert await read(model) == ["가"]
    assert len(gemini.requests) == 1


# A reply that breaks off


CUTS = {
    "has an error event": stream(event("많이 힘드"), event("셨"), error_event(503)),
    "has an event that is not JSON": stream(event("많이 힘드"), event("셨"), b"data: {x\n\n"),
    "has STOP and then a bare error": stream(event("많이 힘드"), event("셨", "STOP"), json.dumps(error(503)).encode()),
    "ends": stream(event("많이 힘드"), event("셨")),
    "ends inside an event": stream(event("많이 힘드"), event("셨"), event("겠어요")[:40]),
    "is reset": reset_after(event("많이 힘드"), event("셨")),
    "stalls": silent_after(event("많이 힘드"), event("셨")),
}


@pytest.fixture
async def hasty(gemini: GeminiStandIn) -> AsyncIterator[Gemini]:
    """A client that does not wait long between two chunks."""
    async with client_for(gemini.url, chunk_timeout=1) as opened:
        yield opened


@pytest.mark.parametrize("cut", CUTS)
async def test_a_reply_that_breaks_off_is_continued_once(gemini: GeminiStandIn, hasty: Gemini, cut: str) -> None:
    gemini.answers.extend(
        [CUTS[cut], stream(event("힘드셨겠"), event("어요. 언제부터 "), event("그러셨나요?", "STOP"))]
    )
    assert "".join(await read(hasty)) == "많이 힘드셨겠어요. 언제부터 그러셨나요?"
    first, second = (request["body"] for request in gemini.requests)
    assert second["contents"] == [
        *first["contents"],
        {"role": "model", "parts": [{"text": "많이 힘드셨"}]},
        {"role": "user", "parts": [{"text": CONTINUE}]},
    ]
    assert {**second, "contents": 0} == {**first, "contents": 0}
    assert len(gemini.requests) == 2
    await until(lambda: gemini.ended == 2)


async def test_a_reply_that_ran_out_of_tokens_gets_a_short_end(gemini: GeminiStandIn, model: Gemini) -> None:
    cut = stream(event("네. 많이 힘드"), event("셨", "MAX_TOKENS"))
    for rest in (stream(event("힘드셨겠어요.", "STOP")), stream(event("힘드셨겠어요. 그리고", "MAX_TOKENS"))):
        gemini.answers.extend([cut, rest])
        assert "".join(await read(model)).startswith("네. 많이 힘드셨겠어요.")
        assert gemini.requests[-1]["body"]["contents"][-1]["parts"] == [{"text": FINISH_SENTENCE}]
    # A reply that was whole until now does not become an error because its end fails.
    for rest in (status(503), silent_after(), reset_after()):
        gemini.answers.extend([cut, rest])
        async with client_for(gemini.url, first_chunk_timeout=0.5) as hurried:
            assert "".join(await read(hurried)) == "네. 많이 힘드셨"


async def test_a_reply_that_only_lacked_its_end_gets_no_more_text(gemini: GeminiStandIn, model: Gemini) -> None:
    for rest in (stream(event("있어요."), event(finish="STOP")), stream(event(finish="STOP"))):
        gemini.answers.extend([stream(event("네, 듣고 있어요.")), rest])
        assert "".join(await read(model)) == "네, 듣고 있어요."


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_a_marker_around_the_cut_is_never_shown(gemini: GeminiStandIn, model: Gemini, size: int) -> None:
    rest = RISK_MARKER + " 네, 말씀해 주세요."
    pieces = [event(rest[at : at + size]) for at in range(0, len(rest), size)]
    for begun, said in ((RISK_MARKER[:4], ""), (RISK_MARKER, ""), ("네, ", "네, "), ("네, " + RISK_MARKER[:1], "네, ")):
        gemini.requests.clear()
        gemini.answers.extend([stream(event(begun)), stream(*pieces, event(finish="STOP"))])
        texts: list[str | Notice] = []
        await model.reply(PROMPT, texts.append)
        assert Notice.SELF in texts
        assert "".join(text for text in texts if isinstance(text, str)).strip() == "네, 말씀해 주세요."
        contents = gemini.requests[1]["body"]["contents"]
        assert contents[-2]["parts"] == ([{"text": said}] if said else [{"text": "답 9"}])


async def test_a_rest_that_the_safety_filter_blocks_raises_blocked(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.extend([stream(event("가")), stream(event(finish="SAFETY"))])
    with pytest.raises(Blocked):
        await read(model)


# The fallback


async def test_the_fallback_answers_within_the_same_time(gemini: GeminiStandIn) -> None:
    gemini.answers.extend([status(404), silent_after()])
    async with client_for(gemini.url, fallback_model="m-2", first_chunk_timeout=0.5) as models:
        _, failure = await failure_of(models)
    assert failure.cause == "Gemini: FIRST_CHUNK_TIMEOUT_SECONDS passed"


async def test_the_fallback_continues_its_own_reply(gemini: GeminiStandIn, models: Gemini) -> None:
    gemini.answers.extend([status(404), stream(event("가")), stream(event("나", "STOP"))])
    assert "".join(await read(models)) == "가 나"
    assert asked(gemini) == ["m-1", "m-2", "m-2"]


@pytest.mark.parametrize("failure", ["503", "an error event 503", "an empty stream"])
async def test_the_fallback_is_asked_after_three_attempts(
    gemini: GeminiStandIn, models: Gemini, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    gemini.answers.extend([PASSING[failure]] * 3)
    assert "".join(await read(models)) == "네, 듣고 있어요."
    assert asked(gemini) == ["m-1"] * 3 + ["m-2"]
    (line,) = [message for message in caplog.messages if "attempt 3" in message]
    assert line.endswith("asking GEMINI_FALLBACK_MODEL")


@pytest.mark.parametrize("name", ["model unknown", "quota zero", "the day's quota"])
async def test_the_fallback_is_asked_at_once_where_the_model_is_gone(
    gemini: GeminiStandIn, models: Gemini, name: str
) -> None:
    body = REFUSALS[name][0]
    gemini.answers.append(status(body["error"]["code"], json.dumps(body)))
    await read(models)
    assert asked(gemini) == ["m-1", "m-2"]


async def test_the_fallback_gets_no_thinking_level(gemini: GeminiStandIn, models: Gemini) -> None:
    gemini.answers.append(status(404))
    await read(models)
    first, second = (request["body"] for request in gemini.requests)
    assert first["generationConfig"].pop("thinkingConfig") == {"thinkingLevel": "minimal"}
    assert first == second


@pytest.mark.parametrize("again", [status(503), refusal(400, "Thinking level"), stream()])
async def test_a_fallback_that_fails_too_is_the_end(gemini: GeminiStandIn, models: Gemini, again: Answer) -> None:
    gemini.answers.extend([status(404), again])
    await failure_of(models)
    assert asked(gemini) == ["m-1", "m-2"]


async def test_a_wrong_fallback_name_is_logged_at_the_start(
    gemini: GeminiStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    async def describe(request: web.Request) -> web.StreamResponse:
        return await status(404 if request.path.endswith("m-2") else 200)(request)

    gemini.description = describe
    async with client_for(gemini.url, fallback_model="m-2"):
        await until(lambda: len(gemini.warmed) == 2)
        await warm()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "bemore_voice"]
    assert "GEMINI_FALLBACK_MODEL is unknown or retired" in line


# Connections


async def warm() -> None:
    """Wait until the connection that a client opens ahead has been given back."""
    await until(lambda: not any(task.get_name() == "warm up" for task in asyncio.all_tasks()))


async def test_one_connection_is_kept_for_the_next_reply(gemini: GeminiStandIn, model: Gemini) -> None:
    await warm()
    for _ in range(5):
        await read(model)
    assert set(gemini.peers) == set(gemini.warmed)
    assert len(gemini.warmed) == 1


async def test_a_connection_is_opened_before_the_first_word(gemini: GeminiStandIn) -> None:
    async with client_for(gemini.url) as model:
        await warm()
        model.prepare()
        await read(model)
        assert gemini.peers == gemini.warmed
    async with client_for(gemini.url, keepalive=0) as model:  # any silence closes it
        await until(lambda: len(gemini.warmed) == 2)
        model.prepare()
        await until(lambda: len(gemini.warmed) == 3)
    assert len(gemini.requests) == 1


async def test_a_model_that_is_away_at_the_start_holds_nothing_up(gemini: GeminiStandIn) -> None:
    gemini.description = status(503)
    await gemini.close()
    async with client_for(f"{gemini.url}/v1beta") as model:
        await gemini.open()
        assert "".join(await read(model)) == "네, 듣고 있어요."

    async def silent(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    gemini.description = silent
    async with client_for(f"{gemini.url}/v1beta") as model:
        assert "".join(await read(model)) == "네, 듣고 있어요."


RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # at close, in place of an orderly end


async def test_stale_connections_cost_no_reply(gemini: GeminiStandIn, model: Gemini) -> None:
    """Each is reset at its next use, as by a router that has forgotten it; and the service has a bad moment, too."""
    await warm()
    together, stale, reused = asyncio.Barrier(3), set[Any](), []

    async def keep(request: web.Request) -> web.StreamResponse:
        await together.wait()
        return await gemini_default(request)

    async def forget(request: web.Request) -> web.StreamResponse:
        if gemini.peers[-1] in stale:
            reused.append(gemini.peers[-1])
            assert request.transport is not None
            request.transport.get_extra_info("socket").setsockopt(*RESET)
            request.transport.abort()
            return web.Response()
        return await (fresh.popleft() if fresh else gemini_default)(request)

    gemini_default, fresh = gemini.default, deque[Answer]()
    gemini.default = keep
    await asyncio.gather(*(read(model) for _ in range(3)))
    stale.update(gemini.peers)
    assert len(stale) == 3
    gemini.default = forget
    for number in range(1, 4):
        fresh.extend([status(503, Retry_After="0")] * 2)
        gemini.requests.clear()
        assert "".join(await read(model)) == "네, 듣고 있어요."
        assert len(gemini.requests) == 4
        assert len(reused) == number


async def test_a_retry_takes_a_connection_of_its_own(gemini: GeminiStandIn, model: Gemini) -> None:
    await warm()
    await asyncio.gather(*(read(model) for _ in range(3)))
    kept = set(gemini.peers)
    gemini.peers.clear()
    gemini.answers.extend([status(503), status(503)])
    await read(model)
    first, *retries = gemini.peers
    assert first in kept
    assert len({*retries} - kept) == 2


async def test_two_hundred_replies_at_once_have_two_hundred_streams(gemini: GeminiStandIn, model: Gemini) -> None:
    together = asyncio.Barrier(200)

    async def answer(request: web.Request) -> web.StreamResponse:
        await together.wait()
        return await stream(event("가", "STOP"))(request)

    gemini.default = answer
    assert await asyncio.gather(*(read(model) for _ in range(200))) == [["가"]] * 200
