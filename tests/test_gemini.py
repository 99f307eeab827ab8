"""Gemini over REST, against a local server that speaks its SSE, with google-genai as the oracle."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web
from google import genai
from google.genai import types
from standin import Answer, GeminiStandIn, event, status, stream
from tools import until

from bemore.counsellor import Blocked, Failed, Prompt, Turn
from bemore.gemini import Gemini, parse_retry_after

KEY = "a-key-that-nobody-may-see"
PROMPT = Prompt("따뜻하게 답하세요.", "요즘 잠이 안 와요", [Turn(n, f"말 {n}", f"답 {n}") for n in range(10)])


def client_for(base_url: str, **options: Any) -> Gemini:
    values: dict[str, Any] = {
        "api_key": KEY,
        "model": "m-1",
        "max_output_tokens": 200,
        "thinking_level": "minimal",
        "first_chunk_timeout": 15,
        "chunk_timeout": 10,
        "reply_timeout": 60,
    }
    return Gemini(base_url=base_url, **{**values, **options})


@pytest.fixture
async def model(gemini: GeminiStandIn) -> AsyncIterator[Gemini]:
    async with client_for(f"{gemini.url}/v1beta") as opened:
        yield opened


async def read(model: Gemini, prompt: Prompt = PROMPT) -> list[str]:
    async with aclosing(model.reply(prompt)) as texts:
        return [str(text) async for text in texts]


async def failure_of(model: Gemini) -> tuple[list[str], Failed]:
    texts: list[str] = []

    async def collect() -> None:
        async with aclosing(model.reply(PROMPT)) as pieces:
            async for text in pieces:
                texts.append(str(text))  # noqa: PERF401 - what came before the failure counts

    with pytest.raises(Failed) as caught:
        await collect()
    assert KEY not in repr(caught.value)
    return texts, caught.value


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


BODY = event("가") + event("나다 😥") + event("라") + event("", "STOP")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
async def test_a_stream_may_be_cut_anywhere(gemini: GeminiStandIn, model: Gemini, size: int) -> None:
    """Also inside a Hangul character, and one byte at a time."""
    gemini.default = stream(*(BODY[at : at + size] for at in range(0, len(BODY), size)))
    assert "".join(await read(model)) == "가나다 😥라"


async def test_a_line_of_900_kib_is_read(gemini: GeminiStandIn, model: Gemini) -> None:
    part = json.dumps({"text": "가", "thoughtSignature": "A" * 900 * 1024})
    gemini.default = stream(
        f'data: {{"candidates": [{{"content": {{"parts": [{part}]}}}}]}}\r\n\r\n'.encode(), event("나", "STOP")
    )
    assert "".join(await read(model)) == "가나"


async def test_a_line_of_over_1_mib_fails(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.default = stream(event("가"), b"data: " + b"A" * 1024 * 1024 + b"\n", event("나", "STOP"))
    texts, failure = await failure_of(model)
    assert texts == ["가"]
    assert "1 MiB" in failure.cause


async def test_thoughts_and_empty_chunks_are_not_said(gemini: GeminiStandIn, model: Gemini) -> None:
    parts = [{"text": "hm", "thought": True}, {"text": "가"}]
    thought = b"data: " + json.dumps({"candidates": [{"content": {"parts": parts}}]}).encode() + b"\n\n"
    gemini.default = stream(thought, b": comment\n\n", b'data: {"candidates": []}\n\n', event(""), event(finish="STOP"))
    assert await read(model) == ["가"]


async def test_a_last_line_without_its_end_is_read(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.default = stream(event("가"), event("", "STOP").rstrip())
    assert await read(model) == ["가"]


async def test_max_tokens_with_text_is_a_reply(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.default = stream(event("가"), event("나", "MAX_TOKENS"))
    assert "".join(await read(model)) == "가나"


async def test_max_tokens_without_text_names_both_settings(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.default = stream(event(finish="MAX_TOKENS"))
    texts, failure = await failure_of(model)
    assert texts == []
    assert "GEMINI_MAX_OUTPUT_TOKENS" in failure.cause
    assert "GEMINI_THINKING_LEVEL" in failure.cause


@pytest.mark.parametrize(
    ("blocks", "before"),
    [
        ([event(finish="SAFETY")], []),
        ([event("가"), event(finish="SAFETY")], ["가"]),
        ([event(finish="PROHIBITED_CONTENT")], []),
        ([b'data: {"promptFeedback": {"blockReason": "SAFETY"}}\n\n'], []),
        ([b'data: {"promptFeedback": {"blockReason": "OTHER"}, "usageMetadata": {}}\n\n'], []),
    ],
)
async def test_what_the_safety_filter_holds_back_is_told_as_such(
    gemini: GeminiStandIn, model: Gemini, blocks: list[bytes], before: list[str]
) -> None:
    gemini.default = stream(*blocks)
    texts: list[str] = []

    async def collect() -> None:
        async with aclosing(model.reply(PROMPT)) as pieces:
            async for text in pieces:
                texts.append(str(text))  # noqa: PERF401 - what came before counts

    with pytest.raises(Blocked):
        await collect()
    assert texts == before


@pytest.mark.parametrize(
    ("answer", "shown", "cause"),
    [
        (stream(), [], "without a finish reason"),
        (stream(event("가"), b"data: {nonsense}\n\n"), ["가"], "not JSON"),
        (stream(event("가"), b"data: [1]\n\n"), ["가"], "another shape"),
        (stream(event("가"), b'data: {"candidates": [{"content": "x"}]}\n\n'), ["가"], "another shape"),
        (stream(event("가"), b'data: {"error": {"code": 503}}\n\n'), ["가"], "error event"),
        (stream(b"<html>a page</html>", headers={"Content-Type": "text/html"}), [], "without a finish reason"),
        (stream(event("", "STOP")), [], "STOP without any text"),
        (stream(event("가"), event("", "RECITATION")), ["가"], "no end of a reply"),
    ],
)
async def test_a_stream_that_is_no_whole_reply_fails_and_is_not_asked_again(
    gemini: GeminiStandIn, model: Gemini, answer: Answer, shown: list[str], cause: str
) -> None:
    gemini.answers.append(answer)
    texts, failure = await failure_of(model)
    assert texts == shown
    assert cause in failure.cause
    assert len(gemini.requests) == 1
    assert await read(model)  # and the next reply is none the worse


# Retries


def reset_after(*blocks: bytes) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for block in blocks:
            await response.write(block)
        assert request.transport is not None
        if blocks:
            await asyncio.sleep(0.1)  # a reset overtakes what was written just before it
        request.transport.abort()
        return response

    return answer


@pytest.mark.parametrize("fault", [status(408), status(429), status(500), status(503), status(599), reset_after()])
async def test_a_passing_fault_before_the_first_chunk_is_tried_again(
    gemini: GeminiStandIn, model: Gemini, fault: Answer
) -> None:
    gemini.answers.extend([fault, fault])
    assert "".join(await read(model)) == "네, 듣고 있어요."
    assert len(gemini.requests) == 3


async def test_three_attempts_are_all(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.default = status(503)
    _, failure = await failure_of(model)
    assert failure.cause == "Gemini: status 503, attempt 3"
    assert len(gemini.requests) == 3


@pytest.mark.parametrize(
    ("number", "names"),
    [(400, "GEMINI_API_KEY"), (401, "GEMINI_API_KEY"), (403, "GEMINI_API_KEY"), (404, "GEMINI_MODEL"), (302, "302")],
)
async def test_what_an_operator_must_mend_is_not_tried_again(
    gemini: GeminiStandIn, model: Gemini, number: int, names: str
) -> None:
    gemini.default = status(number, Location="http://127.0.0.1:9/elsewhere")
    _, failure = await failure_of(model)
    assert names in failure.cause
    assert len(gemini.requests) == 1


async def test_a_short_retry_after_is_honoured(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.append(status(429, Retry_After="1"))
    asked = time.monotonic()
    await read(model)
    assert time.monotonic() - asked >= 1
    assert len(gemini.requests) == 2


@pytest.mark.parametrize("value", ["16", "3600", formatdate(time.time() + 600, usegmt=True)])
async def test_a_retry_after_beyond_the_budget_fails_at_once(gemini: GeminiStandIn, model: Gemini, value: str) -> None:
    gemini.default = status(429, Retry_After=value)
    asked = time.monotonic()
    await failure_of(model)
    assert time.monotonic() - asked < 5
    assert len(gemini.requests) == 1


def test_retry_after_is_a_number_or_a_date_or_nothing() -> None:
    now = 1_800_000_000.0
    assert parse_retry_after(None, now) is None
    assert parse_retry_after("soon", now) is None
    assert parse_retry_after("7", now) == 7
    assert parse_retry_after(formatdate(now - 60, usegmt=True), now) == 0
    assert parse_retry_after(formatdate(now + 60, usegmt=True), now) == 60
    assert parse_retry_after("Mon, 01 Jan 2024 00:00:00 +99999999999999", now) is None


async def test_a_refused_connection_is_tried_again_and_fails(gemini: GeminiStandIn) -> None:
    async with client_for("http://127.0.0.1:9") as model:
        _, failure = await failure_of(model)
    assert failure.cause == "Gemini: connection failed (ClientConnectorError), attempt 3"


async def test_a_name_that_nobody_knows_fails(gemini: GeminiStandIn) -> None:
    # .invalid is reserved to be no name (RFC 2606).
    async with client_for("http://nobody.invalid") as model:
        _, failure = await failure_of(model)
    assert "ClientConnectorDNSError" in failure.cause


# Time limits


def silent_after(*blocks: bytes) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for block in blocks:
            await response.write(block)
        await asyncio.Event().wait()
        return response

    return answer


async def test_a_first_chunk_that_never_comes_is_not_tried_again(gemini: GeminiStandIn) -> None:
    gemini.answers.append(silent_after(b": nothing yet\n\n"))
    async with client_for(gemini.url, first_chunk_timeout=0.3) as model:
        _, failure = await failure_of(model)
        assert failure.cause == "Gemini: FIRST_CHUNK_TIMEOUT_SECONDS passed"
        await until(lambda: gemini.ended == 1)  # the stand-in has seen its connection close
        assert len(gemini.requests) == 1
        assert await read(model)


async def test_a_stream_that_drips_for_ever_fails(gemini: GeminiStandIn) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(event("가"))
            await asyncio.sleep(0.05)

    gemini.answers.append(drip)
    async with client_for(gemini.url, reply_timeout=0.5) as model:
        texts, failure = await failure_of(model)
        assert len(texts) > 1
        assert failure.cause == "Gemini: REPLY_TIMEOUT_SECONDS passed"
        assert await read(model)


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


async def test_a_connection_is_warm_before_the_first_word_and_again_after_a_silence(gemini: GeminiStandIn) -> None:
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


@pytest.mark.parametrize("number", [400, 401, 403, 404])
async def test_a_wrong_key_or_name_is_told_before_anyone_speaks(
    gemini: GeminiStandIn, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    gemini.description = status(number, "hush")
    async with client_for(gemini.url):
        await until(lambda: caplog.records)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"Gemini: status {number} for the model's description: check GEMINI_")
    assert "hush" not in line


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


async def test_a_tail_that_never_ends_does_not_hold_the_reply_up(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.append(silent_after(event("가", "STOP")))
    assert await read(model) == ["가"]


async def test_two_hundred_replies_at_once_have_two_hundred_streams(gemini: GeminiStandIn, model: Gemini) -> None:
    together = asyncio.Barrier(200)

    async def answer(request: web.Request) -> web.StreamResponse:
        await together.wait()
        return await stream(event("가", "STOP"))(request)

    gemini.default = answer
    assert await asyncio.gather(*(read(model) for _ in range(200))) == [["가"]] * 200


async def test_leaving_a_reply_closes_its_stream(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.append(silent_after(event("가")))
    async with aclosing(model.reply(PROMPT)) as texts:
        assert await anext(texts) == "가"
    await until(lambda: gemini.ended == 1)
