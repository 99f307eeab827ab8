"""Gemini over REST, against a local server that speaks its SSE, with google-genai as the oracle."""

import asyncio
import json
import socket
import struct
import time
import tracemalloc
import zlib
from collections import deque
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web
from google import genai
from google.genai import types
from hypothesis import given
from hypothesis import strategies as st
from standin import Answer, GeminiStandIn, event, reset_after, silent_after, status, stream
from tools import until

from bemore.counsellor import MARKERS, Blocked, Failed, Notice, PastTurn, Prompt
from bemore.gemini import GO_ON, Gemini, Joint, parse_retry_after

RISK_MARKER = next(iter(MARKERS))
KEY = "a-key-that-nobody-may-see"
PROMPT = Prompt("따뜻하게 답하세요.", "요즘 잠이 안 와요", [PastTurn(n, f"말 {n}", f"답 {n}") for n in range(10)])


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
    texts: list[str | Notice] = []
    await model.reply(prompt, texts.append)
    return [str(text) for text in texts]


async def failure_of(model: Gemini) -> tuple[list[str], Failed]:
    texts: list[str | Notice] = []
    with pytest.raises(Failed) as caught:
        await model.reply(PROMPT, texts.append)
    assert KEY not in repr(caught.value)
    return [str(text) for text in texts], caught.value


async def leave_after(model: Gemini, number: int) -> list[str]:
    """Read so many pieces of a reply and leave it, as by a cancel; return them."""
    texts: list[str | Notice] = []
    reading = asyncio.create_task(model.reply(PROMPT, texts.append))
    await until(lambda: len(texts) == number)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    return [str(text) for text in texts]


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
    texts: list[str | Notice] = []
    with pytest.raises(Blocked):
        await model.reply(PROMPT, texts.append)
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


def bomb(size: int) -> bytes:
    """So many zeros, as gzip."""
    gzip, zeros = zlib.compressobj(level=1, wbits=31), bytes(1024 * 1024)
    return b"".join(gzip.compress(zeros) for _ in range(size // len(zeros))) + gzip.flush()


async def test_an_answer_that_is_gzip_although_nobody_asked_for_it_is_refused_unread(
    gemini: GeminiStandIn, model: Gemini
) -> None:
    await warm()
    gemini.description = gemini.default = stream(bomb(1024 * 1024 * 1024), headers={"Content-Encoding": "gzip"})
    tracemalloc.start()
    try:
        texts, failure = await failure_of(model)
        async with client_for(gemini.url):
            await until(lambda: len(gemini.warmed) == 2)
            await warm()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert texts == []
    assert "Content-Encoding" in failure.cause
    assert len(gemini.requests) == 1
    assert gemini.requests[0]["headers"]["Accept-Encoding"] == "identity"
    assert peak < 32 * 1024 * 1024


@pytest.mark.parametrize("encoding", ["deflate", "br", "zstd", "GZIP", "gzip, gzip", "unheard-of"])
async def test_no_encoding_but_identity_is_read(gemini: GeminiStandIn, model: Gemini, encoding: str) -> None:
    gemini.answers.append(silent_after(headers={"Content-Encoding": encoding}))
    _, failure = await failure_of(model)
    assert "Content-Encoding" in failure.cause
    gemini.answers.append(stream(event("가", "STOP"), headers={"Content-Encoding": "identity"}))
    assert await read(model) == ["가"]


# Retries


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


async def test_a_retry_after_with_a_huge_zone_offset_counts_as_none(gemini: GeminiStandIn, model: Gemini) -> None:
    for digits in (4, 12, 30, 400):
        gemini.answers.append(status(503, Retry_After="Mon, 01 Jan 2024 00:00:00 -" + "9" * digits))
        assert "".join(await read(model)) == "네, 듣고 있어요."
    assert len(gemini.requests) == 8


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


# An answer that was cut off


CUTS = {
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
async def test_an_answer_that_is_cut_off_is_gone_on_with_once(gemini: GeminiStandIn, hasty: Gemini, cut: str) -> None:
    gemini.answers.extend(
        [CUTS[cut], stream(event("힘드셨겠"), event("어요. 언제부터 "), event("그러셨나요?", "STOP"))]
    )
    assert "".join(await read(hasty)) == "많이 힘드셨겠어요. 언제부터 그러셨나요?"
    first, second = (request["body"] for request in gemini.requests)
    assert second["contents"] == [
        *first["contents"],
        {"role": "model", "parts": [{"text": "많이 힘드셨"}]},
        {"role": "user", "parts": [{"text": GO_ON}]},
    ]
    assert {**second, "contents": 0} == {**first, "contents": 0}
    await until(lambda: gemini.ended == 2)


@pytest.mark.parametrize("again", [*CUTS.values(), status(503), silent_after()])
async def test_an_answer_that_is_cut_off_twice_fails(gemini: GeminiStandIn, again: Answer) -> None:
    gemini.answers.extend([CUTS["ends"], again])
    async with client_for(gemini.url, chunk_timeout=1, first_chunk_timeout=2) as model:
        texts, _ = await failure_of(model)
    assert "".join(texts) == "많이 힘드셨"  # and nothing twice
    assert len(gemini.requests) == 2


async def test_the_rest_of_an_answer_comes_within_the_time_for_all_of_it(gemini: GeminiStandIn) -> None:
    gemini.answers.extend([stream(event("가")), silent_after()])
    async with client_for(gemini.url, reply_timeout=0.5) as model:
        _, failure = await failure_of(model)
    assert failure.cause == "Gemini: REPLY_TIMEOUT_SECONDS passed"


async def test_an_answer_that_only_lacked_its_end_needs_no_rest(gemini: GeminiStandIn, model: Gemini) -> None:
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


async def test_the_safety_filter_in_the_rest_of_an_answer_is_told_as_such(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.extend([stream(event("가")), stream(event(finish="SAFETY"))])
    with pytest.raises(Blocked):
        await read(model)


async def test_leaving_the_rest_of_an_answer_closes_its_stream(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.extend([stream(event("가")), silent_after(event("나"))])
    assert await leave_after(model, 2) == ["가", " 나"]
    await until(lambda: gemini.ended == 2)


@pytest.mark.parametrize(
    ("said", "rest", "whole"),
    [
        ("많이 힘드", "힘드셨겠어요.", "많이 힘드셨겠어요."),  # the last word again, as it was asked for
        ("많이 힘드", "많이 힘드셨겠어요.", "많이 힘드셨겠어요."),  # all of it again
        ("네. 많이 힘드", " 많이 힘드셨겠어요.", "네. 많이 힘드셨겠어요."),
        ("네, 오늘은 ", "오늘은 쉬세요.", "네, 오늘은 쉬세요."),
        ("네, 오늘은 ", "쉬세요.", "네, 오늘은 쉬세요."),
        ("네, 오늘은", "쉬세요.", "네, 오늘은 쉬세요."),
        ("네, 오늘은", " 쉬세요.", "네, 오늘은 쉬세요."),
        ("네.", "네. 그러셨군요.", "네. 그러셨군요."),
        ("네.\n", "그러셨군요.", "네.\n그러셨군요."),
        ("네", ", 그러셨군요.", "네, 그러셨군요."),
        ("나는 그 ", "그래서 왔어요.", "나는 그 그래서 왔어요."),  # begins like the last word, but is another
        ("그렇습니다", "다음에 봬요.", "그렇습니다 다음에 봬요."),  # and like its last letter
        ("네. 네.", "네. 네. 그럼요.", "네. 네. 그럼요."),
        ("네.", "", "네."),
        ("네.", "네.", "네."),
        ("", "  네.", "  네."),
    ],
)
def test_the_rest_is_joined_with_no_word_twice_and_a_space_between(said: str, rest: str, whole: str) -> None:
    for size in range(1, len(rest) + 2):
        joint = Joint(said)
        told = [joint.feed(rest[at : at + size]) for at in range(0, len(rest), size)]
        assert said + "".join(told) + joint.rest() == whole


@given(st.text("가나 ,."), st.text("가나 ,.다"))
def test_the_joint_loses_nothing_but_what_was_said_before(said: str, rest: str) -> None:
    joint = Joint(said)
    told = "".join(map(joint.feed, rest)) + joint.rest()
    assert (said + rest).replace(" ", "").endswith(told.replace(" ", ""))
    lost = rest.replace(" ", "").removesuffix(told.replace(" ", ""))
    assert said.replace(" ", "").endswith(lost)


# The fallback


OVERLOADED: dict[str, tuple[list[Answer], int]] = {
    "429 without a Retry-After": ([status(429)], 1),
    "429 with a Retry-After beyond the budget": ([status(429, Retry_After="3600")], 1),
    "429 after the attempts": ([status(429, Retry_After="0")] * 3, 3),
    "500 after the attempts": ([status(500, Retry_After="0")] * 3, 3),
    "503 after the attempts": ([status(503, Retry_After="0")] * 3, 3),
    "503 with a Retry-After beyond the budget": ([status(503, Retry_After="3600")], 1),
    "404": ([status(404)], 1),
}


@pytest.fixture
async def models(gemini: GeminiStandIn) -> AsyncIterator[Gemini]:
    async with client_for(gemini.url, fallback_model="m-2") as opened:
        yield opened


def asked(gemini: GeminiStandIn) -> list[str]:
    """The models that were asked, in turn."""
    return [request["path"].removeprefix("/models/").partition(":")[0] for request in gemini.requests]


@pytest.mark.parametrize("name", OVERLOADED)
async def test_the_fallback_is_asked_once_where_the_first_model_is_overloaded_or_gone(
    gemini: GeminiStandIn, models: Gemini, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    answers, attempts = OVERLOADED[name]
    gemini.answers.extend(answers)
    assert "".join(await read(models)) == "네, 듣고 있어요."
    assert asked(gemini) == ["m-1"] * attempts + ["m-2"]
    assert gemini.requests[0]["body"] == gemini.requests[-1]["body"]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "bemore_voice"]
    assert line.endswith("asking GEMINI_FALLBACK_MODEL")


@pytest.mark.parametrize("name", OVERLOADED)
async def test_a_fallback_that_fails_too_is_the_end(gemini: GeminiStandIn, models: Gemini, name: str) -> None:
    answers, attempts = OVERLOADED[name]
    for again in (status(503), status(429), status(404), reset_after()):
        gemini.requests.clear()
        gemini.answers.extend([*answers, again])
        await failure_of(models)
        assert asked(gemini) == ["m-1"] * attempts + ["m-2"]


@pytest.mark.parametrize("fault", [status(400), status(401), status(403), stream(event("", "STOP"))])
async def test_the_fallback_is_not_asked_for_what_it_would_fail_at_too(
    gemini: GeminiStandIn, models: Gemini, fault: Answer
) -> None:
    gemini.answers.append(fault)
    await failure_of(models)
    assert asked(gemini) == ["m-1"]


async def test_a_useful_retry_after_is_waited_for_before_the_fallback(gemini: GeminiStandIn, models: Gemini) -> None:
    gemini.answers.append(status(429, Retry_After="0"))
    await read(models)
    assert asked(gemini) == ["m-1", "m-1"]


async def test_the_fallback_answers_within_the_time_for_the_first_text(gemini: GeminiStandIn) -> None:
    gemini.answers.extend([status(404), silent_after()])
    async with client_for(gemini.url, fallback_model="m-2", first_chunk_timeout=0.5) as models:
        _, failure = await failure_of(models)
    assert failure.cause == "Gemini: FIRST_CHUNK_TIMEOUT_SECONDS passed"


async def test_the_model_that_was_cut_off_goes_on(gemini: GeminiStandIn, models: Gemini) -> None:
    gemini.answers.extend([status(404), stream(event("가")), stream(event("나", "STOP"))])
    assert "".join(await read(models)) == "가 나"
    assert asked(gemini) == ["m-1", "m-2", "m-2"]


async def test_a_wrong_name_of_the_fallback_is_told_before_it_is_needed(
    gemini: GeminiStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    async def describe(request: web.Request) -> web.StreamResponse:
        return await status(404 if request.path.endswith("m-2") else 200)(request)

    gemini.description = describe
    async with client_for(gemini.url, fallback_model="m-2"):
        await until(lambda: len(gemini.warmed) == 2)
        await warm()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "bemore_voice"]
    assert "check GEMINI_FALLBACK_MODEL" in line


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


RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # at close, in place of an orderly end


async def test_six_stale_connections_do_not_cost_two_replies_in_a_row(gemini: GeminiStandIn, model: Gemini) -> None:
    """Each is reset at its next use, as by a router that has forgotten it; and the service has a bad moment, too."""
    await warm()
    together, stale, reused = asyncio.Barrier(6), set[Any](), []

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
    await asyncio.gather(*(read(model) for _ in range(6)))
    stale.update(gemini.peers)
    assert len(stale) == 6
    gemini.default = forget
    for number in range(1, 7):
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


async def test_an_answer_that_never_says_a_word_is_given_up_before_it_takes_much(
    gemini: GeminiStandIn, model: Gemini
) -> None:
    """Events without text, as fast as they go."""

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(event("") * 1000)

    gemini.answers.append(endless)
    texts, failure = await failure_of(model)
    assert texts == []
    assert "silence of over 2 MiB" in failure.cause
    await until(lambda: gemini.ended == 1)


async def test_leaving_a_reply_closes_its_stream(gemini: GeminiStandIn, model: Gemini) -> None:
    gemini.answers.append(silent_after(event("가")))
    assert await leave_after(model, 1) == ["가"]
    await until(lambda: gemini.ended == 1)
