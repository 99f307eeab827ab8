"""Pleas for help: nothing refuses, withdraws or loses the prepared sentence, and a flood of them costs nobody else."""

import asyncio
import itertools
import statistics
import time
from pathlib import Path

import aiohttp
import pytest
from standin import GeminiStandIn, event, stream
from support import (
    Client,
    FaultyStorage,
    ScriptedCounsellor,
    Server,
    is_listening,
    kinds_of,
    make_settings,
    send_together,
    serve,
    started,
    text_of,
)
from tools import open_storage, until

from bemore.care import BLOCKED_REPLY, BLOCKED_SHORT, FIRST, SHORT, Signal
from bemore.counsellor import MARKERS, Emotion, Failed, Prompt
from bemore.demo import Demo, demo_reply
from bemore_voice import MARKER_PROMPT, NOW_PROMPT, RISK_PROMPT, make_counsellor, make_storage, system_prompt

PLEA = "요즘은 그냥 죽고 싶다는 생각만 들어요"
SIGN = "제가 없어지면 다들 편해질 거예요"
THREAT = "그 인간 죽여버리고 싶어요"
FULL = FIRST[Signal.EXPLICIT]
ASK = ("request_ai_response", {"message": PLEA})
CANCEL = ("cancel_ai_response", None)


# The answer


async def check_care(client: Client, message: str, signal: Signal) -> list[dict[str, object]]:
    await client.ask(message)
    frames = await client.reply()
    assert kinds_of(frames)[:2] == ["begin", "chunk"]
    assert kinds_of(frames)[-1] == "complete"
    assert text_of(frames).startswith(FIRST[signal])
    return frames


@pytest.mark.parametrize(
    ("message", "signal"), [(PLEA, Signal.EXPLICIT), (SIGN, Signal.INDIRECT), (THREAT, Signal.VIOLENCE)]
)
async def test_the_helpline_comes_before_the_model_has_said_a_word(
    server: Server, counsellor: ScriptedCounsellor, message: str, signal: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "bemore_voice")
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask(message)
        assert kinds_of([await client.frame()]) == ["begin"]
        assert (await client.frame())["data"] == {"chunk": FIRST[signal]}
        await client.silent()
        talk.say("말씀해 주셔서 고마워요.").end()
        frames = await client.reply()
        assert text_of(frames) == "말씀해 주셔서 고마워요."
        assert kinds_of(frames)[-1] == "complete"
    assert talk.prompt is not None
    assert talk.prompt.at_risk
    assert [row[1] for row in await server.rows()] == [FIRST[signal] + "말씀해 주셔서 고마워요."]
    (line,) = [record.getMessage() for record in caplog.records]
    assert " outcome=complete net=words " in line
    assert signal not in line


async def make_model(kind: str, gemini: GeminiStandIn) -> asyncio.Event:
    """Let the stand-in be gated, failing or blocked."""
    gate = asyncio.Event()

    async def gated(request: object) -> object:
        await gate.wait()
        return await stream(event("네.", "STOP"))(request)  # type: ignore[arg-type]

    gemini.default = {
        "gated": gated,
        "failing": stream(event("네")),
        "blocked": stream(event(finish="SAFETY")),
    }[kind]  # type: ignore[assignment]
    return gate


COMBINATIONS = list(itertools.product(["gated", "failing", "blocked"], ["token", "no token"], ["database", "away"]))


async def test_in_every_combination_the_helpline_comes_at_once_and_the_reply_completes(
    gemini: GeminiStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.STORE_SECONDS", 0.2)
    waits = []
    for number, (model, bucket, database) in enumerate(COMBINATIONS):
        settings = make_settings(
            f"sqlite:///{tmp_path}/{number}.db",
            DEMO_MODE=0,
            GEMINI_API_KEY="k",
            GEMINI_BASE_URL=gemini.url,
            MAX_AI_REQUESTS_PER_MINUTE=1,
        )
        gate = await make_model(model, gemini)
        storage = FaultyStorage(make_storage(settings))
        async with serve(settings, make_counsellor(settings), storage) as server:
            for turn in range(3):
                async with server.connect(str(turn)) as client:
                    gate.clear()
                    if bucket == "no token":
                        await storage.admit(str(turn), time.time_ns() // 1000, 1)
                    if database == "away":
                        storage.fail()
                    asked_before = len(gemini.requests)
                    began = time.perf_counter()
                    await client.ask(PLEA)
                    frames = [await client.frame(), await client.frame()]
                    waits.append(time.perf_counter() - began)
                    gate.set()
                    frames += await client.reply()
                    assert kinds_of(frames)[-1] == "complete", (model, bucket, database)
                    assert "interrupted" not in frames[-1]
                    assert text_of(frames).startswith(FULL)
                    asked = len(gemini.requests) - asked_before
                    well = bucket == "token" and database == "database"
                    assert asked == (well * 2 if model == "failing" else well), "no model past the rate"
                    storage.heal()
                    stored = [row[1] for row in await server.rows(str(turn))]
                    assert stored == ([text_of(frames)] if well else []), "and no row"
                    assert all("109" in reply for reply in stored)
    assert statistics.median(waits) < 0.05


async def test_an_unknown_session_gets_the_helpline_too(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", AUTO_CREATE_SESSIONS=0)
    async with serve(settings, ScriptedCounsellor()) as server, server.connect("unknown") as client:
        frames = await check_care(client, PLEA, Signal.EXPLICIT)
        assert text_of(frames) == FULL
        await client.ask("다른 이야기")
        assert (await client.frame())["code"] == "session_expired"


async def test_it_takes_a_token_when_there_is_one(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_AI_REQUESTS_PER_MINUTE=1)
    async with serve(settings, ScriptedCounsellor()) as server, server.connect() as client:
        frames = await check_care(client, PLEA, Signal.EXPLICIT)
        assert "들은 말" in text_of(frames)
        await client.ask("다른 이야기")
        assert (await client.frame())["code"] == "rate_limited"
        await client.ask(PLEA)
        assert text_of(await client.reply()) == SHORT[Signal.EXPLICIT]


async def test_an_explicit_one_cuts_the_reply_in_progress_short_and_goes_ahead_of_what_waits(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    first, second = counsellor.expect(), counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        first.say("첫째")
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
        await client.ask("둘")
        await client.ask(" ")
        await client.ask(PLEA)
        end = await client.frame()
        assert (end["type"], end["interrupted"]) == ("ai_stream_complete", True)
        second.say("네.").end()
        frames = await client.reply()
        assert text_of(frames) == FULL + "네."
        assert text_of(await client.reply()) == "들은 말: 둘"  # the others keep their turn
        assert (await client.frame())["code"] == "empty_message"
    assert [row[:2] for row in await server.rows()] == [("하나", "첫째"), (PLEA, FULL + "네."), ("둘", "들은 말: 둘")]


async def test_it_does_not_wait_for_a_database_that_hangs(counsellor: ScriptedCounsellor, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    storage = FaultyStorage(make_storage(settings))
    async with serve(settings, counsellor, storage) as server, server.connect() as client:
        talk = counsellor.expect().say("첫째")
        await client.ask("하나")
        await client.frame()
        await client.frame()
        free = storage.hang()
        talk.end()
        await talk.closed.wait()
        await client.silent()
        await client.ask(PLEA)
        assert (await client.frame())["code"] == "ai_unavailable"  # the reply whose row nobody waits for any more
        assert kinds_of([await client.frame()]) == ["begin"]
        assert (await client.frame())["data"] == {"chunk": FULL}
        free.set()
        assert kinds_of(await client.reply())[-1] == "complete"


async def test_several_wait_for_a_database_that_hangs_once_in_all(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.PLEA_WAITS_SECONDS", 2)  # and 30 if each did
    storage = FaultyStorage(make_storage(settings := make_settings(f"sqlite:///{tmp_path}/a.db")))
    async with serve(settings, counsellor, storage) as server, server.connect() as client:
        free = storage.hang()
        await send_together(client, *[ASK] * 15)
        for _ in range(14):
            assert kinds_of(await client.reply()) == ["begin", "chunk", "complete"]
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
        free.set()
        assert kinds_of(await client.reply())[-1] == "complete"


async def test_a_cancelled_one_completes_although_the_database_hangs(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.STORE_SECONDS", 0.3)
    storage = FaultyStorage(make_storage(settings := make_settings(f"sqlite:///{tmp_path}/a.db")))
    async with serve(settings, counsellor, storage) as server, server.connect() as client:
        free = storage.hang()
        await send_together(client, ASK, CANCEL)
        frames = await client.reply()
        assert kinds_of(frames) == ["begin", "chunk", "complete"]
        free.set()


@pytest.mark.parametrize("message", [PLEA + " 아" * 2_000, "아 " * 2_000 + PLEA])
async def test_one_that_is_too_long_is_answered(server: Server, message: str) -> None:
    async with server.connect() as client:
        await check_care(client, message, Signal.EXPLICIT)
    ((stored, *_),) = await server.rows()
    assert PLEA in stored
    assert len(stored) <= 2_000
    assert stored in message


@pytest.mark.parametrize("message", [SIGN, THREAT])
async def test_other_signals_wait_for_their_turn(server: Server, counsellor: ScriptedCounsellor, message: str) -> None:
    talk = counsellor.expect().say("첫째")
    async with server.connect() as client:
        await client.ask("하나")
        await client.frame()
        await client.frame()
        await client.ask(message)
        await client.silent()
        talk.end()
        assert kinds_of(await client.reply()) == ["complete"]
        assert text_of(await client.reply()).startswith(tuple(FIRST.values()))


async def test_a_cancel_in_the_same_packet_leaves_begin_sentence_and_complete(server: Server) -> None:
    async with server.connect() as client:
        for number in range(20):
            await send_together(client, ASK, CANCEL)
            frames = await client.reply()
            assert kinds_of(frames) == ["begin", "chunk", "complete"]
            assert text_of(frames) == (SHORT[Signal.EXPLICIT] if number else FULL)
            assert frames[-1]["interrupted"] is True
    assert len(await server.rows()) == 20


async def test_a_cancel_while_it_waits_leaves_begin_sentence_and_complete(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    counsellor.expect().say("첫째")
    async with server.connect() as client:
        await client.ask("하나")
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
        await send_together(client, ("request_ai_response", {"message": SIGN}), CANCEL)
        assert (await client.frame())["interrupted"] is True
        frames = await client.reply()
        assert text_of(frames) == FIRST[Signal.INDIRECT]
        assert frames[-1]["interrupted"] is True


async def test_barge_in_twice_drops_no_plea(counsellor: ScriptedCounsellor, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", BARGE_IN=1, MAX_AI_REQUESTS_PER_MINUTE=6000)
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask("하나")
        await talk.asked.wait()
        asks = [("request_ai_response", {"message": message}) for message in (PLEA, SIGN, "둘", "셋")]
        await send_together(client, *asks)
        said: list[str] = []
        while not said or said[-1] != "들은 말: 셋":
            frames = await client.reply()
            said.append(text_of(frames))
        assert said[1].startswith(FULL)
        assert said[2] == FIRST[Signal.INDIRECT]


@pytest.mark.parametrize("same", [True, False])
async def test_the_seventeenth_frame_is_taken_when_it_is_a_plea(
    server: Server, counsellor: ScriptedCounsellor, same: bool
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client, server.connect() as other:
        await client.ask("답하는 중")
        await talk.asked.wait()
        for number in range(16):
            await client.ask(f"기다림 {number}")
        await client.silent()
        await (client if same else other).ask(PLEA)
        assert (await client.frame())["interrupted"] is True
        assert text_of(await client.reply()).startswith(FULL)
        for number in range(16):
            assert text_of(await client.reply()) == f"들은 말: 기다림 {number}"


async def test_a_flood_that_closes_its_socket_withdraws_no_plea(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as greedy, server.connect() as other:
        await greedy.ask("답하는 중")
        await talk.asked.wait()
        await greedy.ask(SIGN)
        for number in range(16):
            await greedy.ask(f"기다림 {number}")
        assert await greedy.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION
        talk.say("첫째").end()
        assert text_of(await other.reply()) == "첫째"
        assert text_of(await other.reply()).startswith(FIRST[Signal.INDIRECT])
        await other.silent()


async def test_it_is_kept_for_a_lost_socket(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask(PLEA)
        await talk.asked.wait()
        await client.cut()
    talk.say("네.").end()
    await until(lambda: server.session().worker is None)
    async with server.connect() as client:
        assert text_of(await client.reply()) == FULL + "네."


async def test_the_second_time_it_is_shorter(server: Server) -> None:
    async with server.connect() as client:
        for message, signal in ((PLEA, Signal.EXPLICIT), (SIGN, Signal.INDIRECT), (THREAT, Signal.VIOLENCE)):
            for sentences in (FIRST, SHORT):
                await client.ask(message)
                assert text_of(await client.reply()).startswith(sentences[signal])


async def test_a_thousand_of_them_cost_nobody_else_anything(tmp_path: Path) -> None:
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_AI_REQUESTS_PER_MINUTE=3)
    async with serve(settings, counsellor) as server, server.connect("나") as other:
        pongs = []

        async def flood() -> int:
            said = 0
            for _ in range(25):  # each socket is closed when it has spent its budget
                async with server.connect() as client:
                    for _ in range(40):
                        await client.ask(PLEA)
                    for _ in range(40):
                        frames = await client.reply()
                        assert text_of(frames).startswith((FULL, SHORT[Signal.EXPLICIT]))
                        said += 1
            return said

        flooding = asyncio.create_task(flood())
        while not flooding.done():
            began = time.perf_counter()
            await other.silent()
            pongs.append(time.perf_counter() - began)
            await asyncio.sleep(0.2)  # within the budget of its own
        said = await flooding
        assert said == 1000
        assert len(counsellor.prompts) <= 4  # three, and one that refilled meanwhile
        assert len(await server.rows()) <= 4
        assert statistics.median(pongs) < 0.1
        await until(lambda: [session.id for session in server.sessions] == ["나"])  # nothing is kept for a return


async def test_a_bug_or_a_failure_in_the_middle_still_completes(server: Server, counsellor: ScriptedCounsellor) -> None:
    async with server.connect() as client:
        for error in (KeyError("x"), Failed("test"), asyncio.CancelledError()):
            counsellor.expect().say("네, ").fail(error)
            await client.ask(PLEA)
            frames = await client.reply()
            assert kinds_of(frames)[-1] == "complete"
            assert text_of(frames) in (FULL + "네, ", SHORT[Signal.EXPLICIT] + "네, ")
    assert len(await server.rows()) == 3


async def test_a_stop_of_the_server_does_not_refuse_it(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        await talk.asked.wait()
        await client.ask("둘")
        await client.ask(SIGN)
        await client.silent()
        ending = asyncio.create_task(server.runner.cleanup())
        await until(lambda: server.sessions.draining)
        await client.ask("셋")
        await client.silent()  # pings are answered
        talk.say("첫째").end()
        assert text_of(await client.reply()) == "첫째"
        assert (await client.frame())["code"] == "ai_unavailable"
        assert text_of(await client.reply()) == FIRST[Signal.INDIRECT]
        assert (await client.frame())["code"] == "ai_unavailable"
        await ending
    assert len(counsellor.prompts) == 1


async def test_one_that_comes_while_the_server_stops_is_answered_and_stored(tmp_path: Path) -> None:
    async with started(tmp_path) as program:
        async with program.connect() as client:
            await client.ask("하나")
            await client.frame()
            await client.frame()
            program.process.terminate()
            while await is_listening(program.port):
                pass
            await client.ask(PLEA)
            assert (await client.reply())[-1]["interrupted"] is True
            frames = await client.reply()
            assert text_of(frames) == FULL
            assert kinds_of(frames)[-1] == "complete"
            assert await client.closed() == aiohttp.WSCloseCode.GOING_AWAY
        assert await program.end() == 0
    async with open_storage(f"sqlite:///{tmp_path}/bemore.db") as storage:
        assert (await storage.conversations("s", 1, 2**53))[0]["ai_response"] == FULL


# The second net


async def test_what_the_model_notices_brings_the_sentence_and_the_mark(
    server: Server, counsellor: ScriptedCounsellor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "bemore_voice")
    counsellor.expect().notice().say("네, 듣고 있어요.").end()
    async with server.connect() as client:
        await client.ask("그냥 그래요")
        frames = await client.reply()
        assert text_of(frames) == FULL + "네, 듣고 있어요."
        await client.ask("다른 이야기")
        await client.reply()
    assert [prompt.at_risk for prompt in counsellor.prompts] == [False, True]
    assert " net=model " in caplog.records[0].getMessage()


async def test_it_is_not_said_twice_where_both_nets_speak(server: Server, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().notice().say("네.").end()
    async with server.connect() as client:
        await client.ask(PLEA)
        assert text_of(await client.reply()) == FULL + "네."


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_it_is_not_held_back_by_the_gap_between_two_chunks(
    counsellor: ScriptedCounsellor, tmp_path: Path, how: str
) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", STREAM_CHUNK_INTERVAL_MS=5000)
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect().say("음, ").notice()
        if how == "fails":
            talk.fail(Failed("test"))
        await client.ask("그냥 그래요")
        assert text_of([await client.frame() for _ in range(3)]) == "음, " + FULL
        if how == "is cancelled":
            await client.send("cancel_ai_response")
        assert kinds_of(await client.reply()) == ["complete"]
        assert [row[1] for row in await server.rows()] == ["음, " + FULL]


async def test_to_whom_the_model_has_brought_the_helpline_no_error_is_shown(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    counsellor.expect().notice().fail(Failed("test"))
    async with server.connect() as client:
        await client.ask("그냥 그래요")
        frames = await client.reply()
        assert (text_of(frames), kinds_of(frames)[-1]) == (FULL, "complete")


@pytest.mark.parametrize(("marker", "signal"), list(zip(MARKERS, (Signal.EXPLICIT, Signal.VIOLENCE), strict=True)))
async def test_the_marker_is_asked_for_and_never_shown(
    gemini: GeminiStandIn, tmp_path: Path, marker: str, signal: Signal
) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", DEMO_MODE=0, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url)
    gemini.default = stream(event(marker[:3]), event(marker[3:] + " 네, "), event("듣고 있어요.", "STOP"))
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        await client.ask("그냥 그래요")
        assert text_of(await client.reply()) == FIRST[signal] + " 네, 듣고 있어요."
    assert marker in gemini.requests[0]["body"]["systemInstruction"]["parts"][0]["text"]


# What was said earlier


@pytest.mark.parametrize("message", [PLEA, SIGN])
async def test_a_risk_is_not_forgotten_after_its_turn_has_left_the_window(database_url: str, message: str) -> None:
    counsellor = ScriptedCounsellor()
    settings = make_settings(database_url, AUTO_CREATE_SESSIONS=1, MAX_AI_REQUESTS_PER_MINUTE=6000)
    async with serve(settings, counsellor) as server, server.connect() as client:
        await client.ask("안녕하세요")
        await client.reply()
        await client.ask(message)
        await client.reply()
        for number in range(12):
            await client.ask(f"다른 이야기 {number}")
            await client.reply()
        async with server.connect("다른 세션") as other:
            await other.ask("안녕하세요")
            await other.reply()
    assert [prompt.at_risk for prompt in counsellor.prompts] == [False, *[True] * 13, False]
    assert message not in [turn.user_message for turn in counsellor.prompts[-2].history]


async def test_the_mark_outlives_the_process(database_url: str) -> None:
    counsellor = ScriptedCounsellor()
    settings = make_settings(database_url, AUTO_CREATE_SESSIONS=1)
    for message in (PLEA, "다른 이야기"):
        async with serve(settings, counsellor) as server, server.connect() as client:
            await client.ask(message)
            await client.reply()
    assert [prompt.at_risk for prompt in counsellor.prompts] == [True, True]
    assert RISK_PROMPT in counsellor.prompts[1].instruction


async def test_the_mark_is_set_by_the_next_request_where_the_database_was_away(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.STORE_SECONDS", 0.2)
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    storage = FaultyStorage(make_storage(settings))
    async with serve(settings, counsellor, storage) as server:
        async with server.connect() as client:
            storage.fail()
            await client.ask(PLEA)
            assert text_of(await client.reply()) == FULL
            storage.heal()
        async with server.connect() as client:  # the person comes back, and says something else
            await client.ask("다른 이야기")
            await client.reply()
        assert [row[0] for row in await server.rows()] == ["다른 이야기"]
        assert (await storage.admit("가", 2**52, 6000)).at_risk
    assert [prompt.at_risk for prompt in counsellor.prompts] == [True]


async def test_the_mark_is_tried_again_after_the_person_has_left(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.STORE_SECONDS", 0.1)
    monkeypatch.setattr("bemore_voice.SETTLE_SECONDS", 0.1)
    monkeypatch.setattr("bemore_voice.RESUME_SECONDS", 0.1)
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    storage = FaultyStorage(make_storage(settings))
    async with serve(settings, counsellor, storage) as server:
        storage.fail()
        async with server.connect() as client:  # which cannot create the session
            await client.ask(PLEA)
            await client.reply()
        storage.heal()
        await until(lambda: not server.sessions)  # nothing is left to be done, or kept
        assert (await storage.admit("가", 2**52, 6000)).at_risk


async def test_a_mistake_of_ours_in_settling_keeps_no_session(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.STORE_SECONDS", 0.1)
    monkeypatch.setattr("bemore_voice.SETTLE_SECONDS", 0.1)
    monkeypatch.setattr("bemore_voice.RESUME_SECONDS", 0.1)
    storage = FaultyStorage(make_storage(settings := make_settings(f"sqlite:///{tmp_path}/a.db")))
    mistakes = 0

    async def fail(_: str) -> None:
        nonlocal mistakes
        if storage.fault is None and mistakes < 3:
            mistakes += 1
            raise RuntimeError("a mistake")

    async with serve(settings, counsellor, storage) as server:
        storage.fail()
        async with server.connect() as client:
            await client.ask(PLEA)
            await client.reply()
        storage.wait = fail
        storage.heal()
        await until(lambda: not server.sessions)
        assert mistakes == 3
        assert (await storage.admit("가", 2**52, 6000)).at_risk


async def test_a_refused_cancelled_one_is_marked_too(server: Server) -> None:
    async with server.connect() as client:
        await send_together(client, ASK, CANCEL)
        await client.reply()
    assert (await server.storage.admit("가", 2**52, 6000)).at_risk


@pytest.mark.parametrize("emotion", [None, *Emotion])
def test_the_prompt_says_so_in_place_of_the_emotion(emotion: Emotion | None) -> None:
    calm, risk = system_prompt(emotion), system_prompt(emotion, at_risk=True)
    assert risk.endswith(RISK_PROMPT)
    assert RISK_PROMPT not in calm
    assert MARKER_PROMPT in calm
    assert MARKER_PROMPT in risk
    for signal in Signal:
        now = system_prompt(emotion, now=signal, at_risk=True)
        assert NOW_PROMPT.splitlines()[1][:20] in now
        assert not any(marker in now for marker in MARKERS)  # the app has spoken already
        assert "{" not in now


async def test_the_model_is_told(gemini: GeminiStandIn, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", DEMO_MODE=0, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url)
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        for message in ("안녕하세요", PLEA, "다른 이야기"):
            await client.ask(message, emotion="sad")
            await client.reply()
    told = [request["body"]["systemInstruction"]["parts"][0]["text"] for request in gemini.requests]
    expected = [system_prompt(Emotion.SAD), system_prompt(Emotion.SAD, now=Signal.EXPLICIT)]
    assert told == [*expected, system_prompt(Emotion.SAD, at_risk=True)]


def test_the_demo_does_not_play_with_it() -> None:
    reply = demo_reply(Prompt("", PLEA, emotion=Emotion.SAD, at_risk=True))
    assert "죽" not in reply
    assert "체험용" in reply
    assert Demo.name == "demo"


async def test_a_blocked_reply_is_no_error(gemini: GeminiStandIn, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", DEMO_MODE=0, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url)
    gemini.default = stream(event(finish="SAFETY"))
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        await client.ask("다른 이야기")
        frames = await client.reply()
        assert text_of(frames) == BLOCKED_REPLY
        assert kinds_of(frames)[-1] == "complete"
        await until(lambda: server.session().worker is None)


async def test_a_blocked_reply_after_the_sentence_does_not_name_the_numbers_again(
    gemini: GeminiStandIn, tmp_path: Path
) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", DEMO_MODE=0, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url)
    gemini.default = stream(event(finish="SAFETY"))
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        await client.ask(PLEA)
        assert text_of(await client.reply()) == f"{FULL} {BLOCKED_SHORT}"
