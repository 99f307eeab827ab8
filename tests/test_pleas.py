"""The crisis lane: what it recognises, and that nothing keeps its answer from a person."""

import asyncio
import itertools
import statistics
import time
from pathlib import Path

import pytest
from crisis_sentences import GROUPS, is_tuning
from standin import GeminiStandIn, event, stream
from support import Client, FaultyStorage, ScriptedCounsellor, Server, kinds_of, make_settings, serve, text_of
from tools import until

from bemore.care import BLOCKED_REPLY, CARE, Signal, crisis_signal
from bemore.counsellor import Emotion, Failed, Prompt
from bemore.demo import Demo, demo_reply
from bemore_voice import RISK_PROMPT, make_counsellor, make_storage, system_prompt

PLEA = "요즘은 그냥 죽고 싶다는 생각만 들어요"
SIGN = "제 물건은 친구들에게 다 나눠줬어요"


def share(group: str, *signals: Signal, tuning: bool | None = None) -> float:
    """The share of a group's sentences, or of one half of them, that raise one of these signals."""
    sentences = [text for text in GROUPS[group] if tuning is None or is_tuning(text) is tuning]
    return sum(crisis_signal(text) in signals for text in sentences) / len(sentences)


def test_recall_and_false_alarms_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    any_signal = (Signal.EXPLICIT, Signal.INDIRECT)
    with capsys.disabled():
        print("\n| group | sentences | first list | either list | measured half, either list |")
        for group, sentences in GROUPS.items():
            figures = (
                share(group, Signal.EXPLICIT),
                share(group, *any_signal),
                share(group, *any_signal, tuning=False),
            )
            print(f"| {group} | {len(sentences)} | " + " | ".join(f"{figure:.0%}" for figure in figures) + " |")
    assert sum(map(len, GROUPS.values())) >= 200
    assert share("explicit", Signal.EXPLICIT) == 1
    assert share("obfuscated", Signal.EXPLICIT) >= 0.95
    assert share("indirect", *any_signal) >= 0.7
    assert share("idiomatic", *any_signal) <= 0.02
    assert share("neutral", Signal.EXPLICIT) == 0
    assert share("neutral", Signal.INDIRECT) <= 0.03
    assert share("negated", Signal.EXPLICIT) >= 0.95


def test_the_halves_are_of_a_size_and_share_nothing() -> None:
    for sentences in GROUPS.values():
        assert len(sentences) == len(set(sentences))
        assert 0.3 < sum(map(is_tuning, sentences)) / len(sentences) < 0.7


def test_the_longest_message_is_read_without_holding_others_up() -> None:
    """Some regular expressions take for ever on a text that almost matches."""
    for piece in ("죽", "죽고 ", "자 ", "약을 ", "짐을 다 ", "ㅈ ", "그", "\u200b", "!? "):
        began = time.process_time()
        crisis_signal((piece * 2000)[:2000])
        assert time.process_time() - began < 1


@pytest.mark.parametrize("signal", list(Signal))
def test_the_prepared_sentences_name_the_helpline_for_the_eye_and_for_the_ear(signal: Signal) -> None:
    assert "109, 일공구" in CARE[signal]
    assert "109" in "".join(BLOCKED_REPLY)
    assert not any(sign in CARE[signal] for sign in "*#-()\n")
    assert len(CARE[signal]) <= 120


# The answer


async def check_care(client: Client, message: str, signal: Signal) -> list[dict[str, object]]:
    await client.ask(message)
    frames = await client.reply()
    assert kinds_of(frames)[:2] == ["begin", "chunk"]
    assert kinds_of(frames)[-1] == "complete"
    assert text_of(frames).startswith(CARE[signal])
    return frames


@pytest.mark.parametrize(("message", "signal"), [(PLEA, Signal.EXPLICIT), (SIGN, Signal.INDIRECT)])
async def test_the_helpline_comes_before_the_model_has_said_a_word(
    server: Server, counsellor: ScriptedCounsellor, message: str, signal: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "bemore_voice")
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask(message)
        assert kinds_of([await client.frame()]) == ["begin"]
        assert (await client.frame())["data"] == {"chunk": CARE[signal]}
        await client.silent()
        talk.say("말씀해 주셔서 고마워요.").end()
        frames = await client.reply()
        assert text_of(frames) == "말씀해 주셔서 고마워요."
        assert kinds_of(frames)[-1] == "complete"
    assert talk.prompt is not None
    assert talk.prompt.at_risk
    assert [row[1] for row in await server.rows()] == [CARE[signal] + "말씀해 주셔서 고마워요."]
    (line,) = [record.getMessage() for record in caplog.records]
    assert " outcome=complete crisis_lane=yes " in line
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
                        await storage.take_token(str(turn), time.time_ns() // 1000, 1)
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
                    assert text_of(frames).startswith(CARE[Signal.EXPLICIT])
                    asked = len(gemini.requests) - asked_before
                    assert asked == int(bucket == "token" and database == "database"), "no model past the rate"
                    storage.heal()
                    stored = [row[1] for row in await server.rows(str(turn))]
                    assert stored == ([text_of(frames)] if database == "database" else [])
                    assert all("109" in reply for reply in stored)
    assert statistics.median(waits) < 0.05


async def test_an_unknown_session_gets_the_helpline_too(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", AUTO_CREATE_SESSIONS=0)
    async with serve(settings, ScriptedCounsellor()) as server, server.connect("unknown") as client:
        frames = await check_care(client, PLEA, Signal.EXPLICIT)
        assert text_of(frames) == CARE[Signal.EXPLICIT]
        await client.ask("다른 이야기")
        assert (await client.frame())["code"] == "session_expired"


async def test_it_takes_a_token_when_there_is_one(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_AI_REQUESTS_PER_MINUTE=1)
    async with serve(settings, ScriptedCounsellor()) as server, server.connect() as client:
        frames = await check_care(client, PLEA, Signal.EXPLICIT)
        assert "들은 말" in text_of(frames)
        await client.ask("다른 이야기")
        assert (await client.frame())["code"] == "rate_limited"
        assert text_of(await check_care(client, PLEA, Signal.EXPLICIT)) == CARE[Signal.EXPLICIT]


async def test_it_waits_for_a_reply_in_progress_and_for_nothing_else(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        talk.say("첫째")
        await client.frame()
        await client.frame()
        await client.ask(PLEA)
        await client.silent()
        talk.end()
        assert kinds_of(await client.reply()) == ["complete"]
        frames = await client.reply()
        assert text_of(frames).startswith(CARE[Signal.EXPLICIT])


async def test_a_bug_or_a_failure_in_the_middle_still_completes(server: Server, counsellor: ScriptedCounsellor) -> None:
    async with server.connect() as client:
        for error in (KeyError("x"), Failed("test"), asyncio.CancelledError()):
            counsellor.expect().say("네, ").fail(error)
            frames = await check_care(client, PLEA, Signal.EXPLICIT)
            assert text_of(frames) == CARE[Signal.EXPLICIT] + "네, "
    assert len(await server.rows()) == 3


async def test_a_stop_of_the_server_does_not_refuse_it(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        await talk.asked.wait()
        await client.ask("둘")
        await client.ask(PLEA)
        await client.silent()
        ending = asyncio.create_task(server.runner.cleanup())
        await asyncio.sleep(0)
        talk.say("첫째").end()
        assert text_of(await client.reply()) == "첫째"
        assert (await client.frame())["code"] == "ai_unavailable"
        assert text_of(await client.reply()).startswith(CARE[Signal.EXPLICIT])
        await ending


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


@pytest.mark.parametrize("emotion", [None, *Emotion])
def test_the_prompt_keeps_saying_so(emotion: Emotion | None) -> None:
    assert RISK_PROMPT in system_prompt(emotion, at_risk=True)
    assert RISK_PROMPT not in system_prompt(emotion)
    assert "109" in RISK_PROMPT


async def test_the_model_is_told(gemini: GeminiStandIn, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", DEMO_MODE=0, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url)
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        for message in ("안녕하세요", PLEA, "다른 이야기"):
            await client.ask(message, emotion="sad")
            await client.reply()
    told = [RISK_PROMPT in request["body"]["systemInstruction"]["parts"][0]["text"] for request in gemini.requests]
    assert told == [False, True, True]


def test_the_demo_does_not_play_with_it() -> None:
    reply = demo_reply(Prompt(PLEA, Emotion.SAD, [], at_risk=True))
    assert "죽" not in reply
    assert "체험용" in reply
    assert Demo.name == "demo"


async def test_a_blocked_reply_is_no_error(gemini: GeminiStandIn, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", DEMO_MODE=0, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url)
    gemini.default = stream(event(finish="SAFETY"))
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        await client.ask("다른 이야기")
        frames = await client.reply()
        assert text_of(frames) == "".join(BLOCKED_REPLY)
        assert kinds_of(frames)[-1] == "complete"
        await until(lambda: server.session().worker is None)
