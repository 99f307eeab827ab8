"""Risk signals: a valid request with one gets its helpline sentence in every case, and the session is marked."""

import asyncio
import itertools
import statistics
import time

import pytest
from aiohttp import web
from standin import Answer, GeminiStandIn, event, stream
from support import TIME_SCALE, Frontend, ScriptedCounsellor, Server, Serving, kinds_of, text_of

from bemore.care import BLOCKED_REPLY, BLOCKED_SHORT, FIRST, SHORT, Signal
from bemore.counsellor import Emotion, Failed
from bemore_voice import Limits, system_prompt

EXPLICIT = "요즘은 그냥 죽고 싶다는 생각만 들어요"
INDIRECT = "제가 없어지면 다들 편해질 거예요"
VIOLENCE = "그 인간 죽여버리고 싶어요"
FULL = FIRST[Signal.EXPLICIT]
ASK = ("request_ai_response", {"message": EXPLICIT})
CANCEL = ("cancel_ai_response", None)


async def at_risk(server: Server, session_id: str = "가") -> bool:
    return (await server.storage.admit(session_id, 2**52, 6000)).at_risk


# The word detector


@pytest.mark.parametrize(
    ("message", "signal"), [(EXPLICIT, Signal.EXPLICIT), (INDIRECT, Signal.INDIRECT), (VIOLENCE, Signal.VIOLENCE)]
)
async def test_sentence_comes_before_the_model_says_a_word(
    server: Server, counsellor: ScriptedCounsellor, message: str, signal: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "bemore_voice")
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask(message)
        assert text_of(await client.begun()) == FIRST[signal]
        await client.silent()
        talk.say("말씀해 주셔서 고마워요.").end()
        frames = await client.reply()
        assert text_of(frames) == "말씀해 주셔서 고마워요."
        assert kinds_of(frames)[-1] == "complete"
    assert talk.prompt is not None
    assert talk.prompt.at_risk
    assert [row[1] for row in await server.rows()] == [FIRST[signal] + "말씀해 주셔서 고마워요."]
    (line,) = [record.getMessage() for record in caplog.records]
    assert " outcome=complete " in line
    assert "detected_by=words " in line
    assert signal not in line


def model_that(kind: str, gate: asyncio.Event) -> Answer:
    async def gated(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return await stream(event("네.", "STOP"))(request)

    return {"waits": gated, "fails": stream(event("네")), "blocks": stream(event(finish="SAFETY"))}[kind]


CASES = list(itertools.product(["waits", "fails", "blocks"], ["token", "no token"], ["database", "no database"]))


async def test_sentence_comes_within_50_ms_in_every_case(serving_gemini: Serving, gemini: GeminiStandIn) -> None:
    """Whatever the model, the bucket and the database do; and the reply completes, where nothing follows too.

    A complete without `interrupted` means a committed row.
    """
    waits = []
    async with serving_gemini(limits=Limits(store_seconds=0.2), MAX_AI_REQUESTS_PER_MINUTE=1) as server:
        for number, (model, bucket, database) in enumerate(CASES):
            gate, session_id = asyncio.Event(), f"session {number}"
            gemini.default = model_that(model, gate)
            await server.storage.create_session(session_id)
            if bucket == "no token":
                await server.storage.admit(session_id, time.time_ns() // 1000, 1)
            asked_before = len(gemini.requests)
            async with server.connect(session_id) as client:
                if database == "no database":
                    server.faults.fail()
                began = time.perf_counter()
                await client.ask(EXPLICIT)
                frames = await client.begun()
                waits.append(time.perf_counter() - began)
                gate.set()
                frames += await client.reply()
            server.faults.heal()
            assert kinds_of(frames)[-1] == "complete", CASES[number]
            assert text_of(frames).startswith(FULL)
            well = bucket == "token" and database == "database"
            assert ("interrupted" not in frames[-1]) == well
            assert len(gemini.requests) - asked_before == well * (2 if model == "fails" else 1)
            assert [row[1] for row in await server.rows(session_id)] == ([text_of(frames)] if well else [])
    assert statistics.median(waits) < 0.05 * TIME_SCALE


async def test_unknown_session_gets_the_sentence(serving: Serving) -> None:
    async with serving(AUTO_CREATE_SESSIONS=0) as server, server.connect("unknown") as client:
        await client.ask(EXPLICIT)
        frames = await client.reply()
        assert (text_of(frames), kinds_of(frames)[-1]) == (FULL, "complete")
        await client.ask("다른 이야기")
        assert (await client.frame())["code"] == "session_expired"


async def test_risk_signal_takes_a_token_and_is_answered_without_one(serving: Serving) -> None:
    async with serving(MAX_AI_REQUESTS_PER_MINUTE=1) as server, server.connect() as client:
        await client.ask(EXPLICIT)
        assert text_of(await client.reply()).startswith(FULL + "들은 말")
        await client.ask("다른 이야기")
        assert (await client.frame())["code"] == "rate_limited"
        await client.ask(EXPLICIT)
        frames = await client.reply()
        assert (text_of(frames), kinds_of(frames)[-1]) == (SHORT[Signal.EXPLICIT], "complete")
        assert len(await server.rows()) == 1


async def test_explicit_signal_interrupts_and_goes_first(server: Server, counsellor: ScriptedCounsellor) -> None:
    first, second = counsellor.expect().say("첫째"), counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        await client.begun()
        await client.ask("둘")
        await client.ask(" ")
        await client.ask(EXPLICIT)
        end = await client.frame()
        assert (end["type"], end["interrupted"]) == ("ai_stream_complete", True)
        second.say("네.").end()
        assert text_of(await client.reply()) == FULL + "네."
        assert text_of(await client.reply()) == "들은 말: 둘"  # the others keep their turn
        assert (await client.frame())["code"] == "empty_message"
        await first.closed.wait()
    rows = [row[:2] for row in await server.rows()]
    assert rows == [("하나", "첫째"), (EXPLICIT, FULL + "네."), ("둘", "들은 말: 둘")]


async def test_explicit_signal_does_not_wait_for_the_database(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("첫째")
    async with server.connect() as client:
        await client.ask("하나")
        await client.begun()
        free = server.faults.hang()
        talk.end()
        await talk.closed.wait()
        await client.silent()
        await client.ask(EXPLICIT)
        assert kinds_of(await client.reply()) == ["complete"]
        assert text_of(await client.begun()) == FULL
        free.set()
        assert kinds_of(await client.reply())[-1] == "complete"
        assert [row[0] for row in await server.rows()] == ["하나", EXPLICIT]


@pytest.mark.parametrize("message", [EXPLICIT + " 아" * 2_000, "아 " * 2_000 + EXPLICIT], ids=["first", "last"])
async def test_signal_in_a_message_that_is_too_long_is_answered(server: Server, message: str) -> None:
    async with server.connect() as client:
        await client.ask(message)
        assert text_of(await client.reply()).startswith(FULL)
    ((stored, *_),) = await server.rows()
    assert EXPLICIT in stored
    assert len(stored) <= 2_000
    assert stored in message


async def test_cancel_right_behind_leaves_sentence_and_complete(server: Server) -> None:
    for number in range(5):
        async with server.connect(str(number)) as client:
            await client.send_together(ASK, CANCEL)
            frames = await client.reply()
            assert kinds_of(frames) == ["begin", "chunk", "complete"]
            assert text_of(frames) == FULL
            assert frames[-1]["interrupted"] is True
            await server.until_idle(str(number))
        assert [row[1] for row in await server.rows(str(number))] == [FULL]
        assert await at_risk(server, str(number))


async def test_signal_behind_a_full_queue_and_a_flood_is_answered(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("답하는 중")
        await talk.asked.wait()
        request = ("request_ai_response", {"message": "가"})
        await client.send_together(*[request] * 30, *[("ping", None)] * 40, ASK)
        while FULL not in text_of(client.frames):
            await client.frame()


@pytest.mark.parametrize("error", [KeyError("x"), Failed("test"), asyncio.CancelledError()], ids=repr)
async def test_failure_after_the_sentence_completes(
    server: Server, counsellor: ScriptedCounsellor, error: BaseException
) -> None:
    counsellor.expect().say("네, ").fail(error)
    async with server.connect() as client:
        await client.ask(EXPLICIT)
        frames = await client.reply()
        assert (text_of(frames), kinds_of(frames)[-1]) == (FULL + "네, ", "complete")
    assert [row[1] for row in await server.rows()] == [FULL + "네, "]


# The model marker


async def test_model_marker_brings_the_sentence_and_the_mark(
    server: Server, counsellor: ScriptedCounsellor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "bemore_voice")
    counsellor.expect().notice().say("네, 듣고 있어요.").end()
    async with server.connect() as client:
        await client.ask("그냥 그래요")
        assert text_of(await client.reply()) == FULL + "네, 듣고 있어요."
        await client.ask("다른 이야기")
        await client.reply()
    assert [prompt.at_risk for prompt in counsellor.prompts] == [False, True]
    assert "detected_by=model " in caplog.records[0].getMessage()


async def test_failure_after_the_model_marker_completes(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    """The sentence does not wait for the interval between two chunks either."""
    talk = counsellor.expect().say("음,")
    async with serving(STREAM_CHUNK_INTERVAL_MS=5000) as server, server.connect() as client:
        await client.ask("그냥 그래요")
        assert text_of(await client.begun()) == "음,"
        talk.notice().fail(Failed("test"))
        frames = await client.reply()
        assert (text_of(frames), kinds_of(frames)[-1]) == (" " + FULL, "complete")


# The mark in the database


async def test_mark_outlives_its_turn_and_the_process(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    async with serving() as server, server.connect() as client:
        for message in ("안녕하세요", INDIRECT, *(f"다른 이야기 {number}" for number in range(11))):
            await client.ask(message)
            await client.reply()
    async with serving() as server, server.connect() as client, server.connect("다른 세션") as other:
        for each in (client, other):
            await each.ask("다른 이야기")
            await each.reply()
    assert [prompt.at_risk for prompt in counsellor.prompts] == [False, *[True] * 13, False]
    assert INDIRECT not in [turn.user_message for turn in counsellor.prompts[-2].history]


async def test_mark_is_retried_after_the_client_has_left(serving: Serving) -> None:
    limits = Limits(store_seconds=0.1, mark_retry_seconds=0.1, keep_reply_seconds=0.1)
    async with serving(limits=limits) as server:
        server.faults.fail()
        async with server.connect() as client:  # the session cannot be created either
            await client.ask(EXPLICIT)
            assert text_of(await client.reply()) == FULL
        server.faults.heal()
        await server.until_forgotten()
        while not (await server.storage.fetch("SELECT at_risk FROM token_buckets WHERE at_risk")):
            pass


# With Gemini


async def test_model_is_told_of_the_sentence_and_of_the_risk(serving_gemini: Serving, gemini: GeminiStandIn) -> None:
    async with serving_gemini() as server, server.connect() as client:
        for message in ("안녕하세요", EXPLICIT, "다른 이야기"):
            await client.ask(message, emotion="sad")
            await client.reply()
    told = [request["body"]["systemInstruction"]["parts"][0]["text"] for request in gemini.requests]
    expected = [system_prompt(Emotion.SAD), system_prompt(Emotion.SAD, sentence_for=Signal.EXPLICIT)]
    assert told == [*expected, system_prompt(Emotion.SAD, at_risk=True)]


async def blocked(client: Frontend, message: str) -> str:
    await client.ask(message)
    frames = await client.reply()
    assert kinds_of(frames)[-1] == "complete"
    return text_of(frames)


async def test_blocked_reply_is_a_caring_one(serving_gemini: Serving, gemini: GeminiStandIn) -> None:
    gemini.default = stream(event(finish="SAFETY"))
    async with serving_gemini() as server, server.connect() as client:
        assert await blocked(client, "다른 이야기") == BLOCKED_REPLY
        assert await blocked(client, EXPLICIT) == f"{FULL} {BLOCKED_SHORT}"
