"""The socket protocol, on a running server with a scripted counsellor."""

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType
from standin import GeminiStandIn, event, stream
from support import ScriptedCounsellor, Server, kinds_of, make_settings, serve, text_of
from tools import until

from bemore.counsellor import Emotion, Failed
from bemore.demo import Demo
from bemore_voice import FRAME_GAP_SECONDS, SENTENCES, ErrorCode, Socket, make_counsellor, system_prompt

COMPLETE = ["begin", "chunk", "complete"]


def error_of(frame: dict[str, Any]) -> str:
    assert frame["type"] == "ai_stream_error"
    assert frame["data"] == {"error": SENTENCES[ErrorCode(frame["code"])]}
    return str(frame["code"])


# One request


async def test_a_reply_is_begin_chunks_complete_and_a_row(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("불안해요", emotion="anxious", timestamp=1704902400000)
        frames = []
        for word in ("네, ", "그러", "셨군요."):
            talk.say(word)
            frames.append(await client.frame())
            if word == "네, ":
                frames.append(await client.frame())
        talk.end()
        frames += await client.reply()
    assert kinds_of(frames) == ["begin", "chunk", "chunk", "chunk", "complete"]
    assert [frame["data"] for frame in frames] == [{}, {"chunk": "네, "}, {"chunk": "그러"}, {"chunk": "셨군요."}, {}]
    assert all(set(frame) == {"type", "data", "seq"} for frame in frames)
    assert await server.rows() == [("불안해요", "네, 그러셨군요.", "anxious", 1704902400000)]
    assert talk.prompt is not None
    assert (talk.prompt.message, talk.prompt.emotion, talk.prompt.history) == ("불안해요", Emotion.ANXIOUS, [])


async def test_begin_waits_for_the_first_text(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        await talk.asked.wait()
        await client.silent()
        talk.say("가").end()
        assert kinds_of(await client.reply()) == COMPLETE


async def test_complete_waits_for_the_row(server: Server, counsellor: ScriptedCounsellor, tmp_path: Path) -> None:
    import sqlite3

    async with server.connect() as client:
        await client.ask()
        await client.reply()
        lock = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
        talk = counsellor.expect()
        await client.ask("둘")
        await talk.asked.wait()
        lock.execute("BEGIN IMMEDIATE")
        talk.say("둘째").end()
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
        await client.silent()
        lock.execute("ROLLBACK")
        lock.close()
        assert kinds_of(await client.reply()) == ["complete"]
    assert [row[1] for row in await server.rows()][1] == "둘째"


async def test_the_last_ten_turns_go_along(server: Server, counsellor: ScriptedCounsellor) -> None:
    async with server.connect() as client:
        for number in range(12):
            await client.ask(f"말 {number}")
            await client.reply()
    history = counsellor.prompts[-1].history
    assert [turn.user_message for turn in history] == [f"말 {number}" for number in range(1, 11)]
    assert history[-1].ai_response == "들은 말: 말 10"


async def test_seq_starts_from_the_clock_and_counts(server: Server) -> None:
    before = int(time.time() * 1e6)
    async with server.connect() as client:
        seqs = []
        for _ in range(3):
            await client.ask()
            seqs += [frame["seq"] for frame in await client.reply()]
    assert before < seqs[0] < 2**53
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


async def test_a_ping_is_answered_at_once_also_during_a_reply(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        talk.say("가")
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
        await client.send("ping")
        pong = await client.frame()
        assert pong["type"] == "pong"
        assert abs(pong["data"]["timestamp"] - time.time() * 1000) < 60_000
        assert set(pong) == {"type", "data"}
        talk.end()
        await client.reply()


async def test_status_and_unknown_types_are_ignored(server: Server) -> None:
    async with server.connect() as client:
        await client.send("status_update", {"anything": [1, 2]})
        await client.send("status_update")
        await client.send("no_such_type", {"message": "가"})
        await client.silent()
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"


async def test_chunks_have_a_smallest_gap_and_what_is_held_back_is_joined(tmp_path: Path) -> None:
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", STREAM_CHUNK_INTERVAL_MS=400)
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask()
        talk.say("하나")
        assert [await client.frame(), await client.frame()][1]["data"] == {"chunk": "하나"}
        first = time.monotonic()
        talk.say("둘", "셋", "넷").end()
        assert (await client.frame())["data"] == {"chunk": "둘셋넷"}
        assert time.monotonic() - first > 0.3
        assert kinds_of([await client.frame()]) == ["complete"]

        talk = counsellor.expect()
        await client.ask()
        talk.say("하나")
        await client.frame()
        await client.frame()
        await asyncio.sleep(0.5)  # a slow model: the gap is over before its next word
        talk.say("둘")
        said = time.monotonic()
        assert (await client.frame())["data"] == {"chunk": "둘"}
        assert time.monotonic() - said < 0.3
        talk.end()
        await client.reply()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Socket, float, dict[str, Any]]]:
    """What the server writes of replies: to whom and when, by its own clock, which no busy reader stretches."""
    frames: list[tuple[Socket, float, dict[str, Any]]] = []
    send = Socket.send

    def noted(self: Socket, frame: bytes, opcode: WSMsgType = WSMsgType.TEXT) -> None:
        if opcode is WSMsgType.TEXT and "seq" in (read := json.loads(frame)):
            frames.append((self, asyncio.get_running_loop().time(), read))
        send(self, frame, opcode)

    monkeypatch.setattr(Socket, "send", noted)
    return frames


def shortest_gap(written: list[tuple[Socket, float, dict[str, Any]]]) -> float:
    """The shortest, in seconds, between a frame of a reply and the one before it to the same socket."""
    last: dict[Socket, float] = {}
    gaps = []
    for socket, now, frame in written:
        if frame["type"] != "ai_stream_begin":
            gaps.append(now - last[socket])
        last[socket] = now
    return min(gaps)


async def test_two_frames_of_a_reply_are_never_within_one_render(
    tmp_path: Path, written: list[tuple[Socket, float, dict[str, Any]]]
) -> None:
    """Neither the begin and the first chunk, nor the last and the end, nor what a page that returns is sent again."""
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", STREAM_CHUNK_INTERVAL_MS=5)
    async with serve(settings, counsellor) as server, server.connect() as client:
        counsellor.expect().say("하나", "둘", "셋").end()
        counsellor.expect().say("하나").fail(Failed("test"))
        talk = counsellor.expect().say("하나")
        await client.ask()
        await client.reply()
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "error"
        await client.ask()
        seen = [await client.frame(), await client.frame()]
        async with server.connect() as other:
            assert [await other.frame(), await other.frame()] == seen
            await client.send("cancel_ai_response")
            assert await client.reply() == await other.reply()
        assert talk.closed.is_set()
        counsellor.expect().say("하나").end()
        await client.ask("죽고 싶어요")
        assert kinds_of(await client.reply())[-1] == "complete"
    assert shortest_gap(written) > FRAME_GAP_SECONDS - 0.001


async def test_without_a_gap_between_chunks_there_is_none_around_a_reply(
    server: Server, counsellor: ScriptedCounsellor, written: list[tuple[Socket, float, dict[str, Any]]]
) -> None:
    counsellor.expect().say("하나", "둘").end()
    async with server.connect() as client:
        await client.ask()
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
    assert shortest_gap(written[:2]) < FRAME_GAP_SECONDS


async def test_what_is_held_for_its_gap_is_said_before_the_goodbye(tmp_path: Path) -> None:
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", STREAM_CHUNK_INTERVAL_MS=50)
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask()
        await talk.asked.wait()
        ending = asyncio.create_task(server.runner.cleanup())
        await until(lambda: server.sessions.draining)
        talk.say("하나").end()
        assert kinds_of(await client.reply()) == ["begin", "chunk", "complete"]
        assert await client.closed() == aiohttp.WSCloseCode.GOING_AWAY
        await ending


async def test_a_reply_that_fails_ends_in_one_error_and_is_not_stored(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    async with server.connect() as client:
        counsellor.expect().fail(Failed("test"))
        await client.ask()
        (frame,) = await client.reply()
        assert error_of(frame) == "ai_unavailable"
        assert "seq" in frame
        counsellor.expect().say("가", "나").fail(Failed("test"))
        await client.ask()
        frames = await client.reply()
        assert (text_of(frames), error_of(frames[-1])) == ("가나", "ai_unavailable")
        await client.ask("다시")
        assert kinds_of(await client.reply())[-1] == "complete"
    assert [row[0] for row in await server.rows()] == ["다시"]


async def test_a_bug_of_ours_is_answered_and_logged_without_words(
    server: Server, counsellor: ScriptedCounsellor, caplog: pytest.LogCaptureFixture
) -> None:
    async with server.connect() as client:
        counsellor.expect().fail(KeyError("a secret that somebody said"))
        await client.ask("a secret that somebody said")
        assert error_of((await client.reply())[-1]) == "ai_unavailable"
        await client.ask("다시")
        assert kinds_of(await client.reply())[-1] == "complete"
    assert "KeyError in stream" in caplog.text
    assert "secret" not in caplog.text


async def test_a_stray_cancellation_is_answered(server: Server, counsellor: ScriptedCounsellor) -> None:
    async with server.connect() as client:
        counsellor.expect().fail(asyncio.CancelledError())
        await client.ask()
        assert error_of((await client.reply())[-1]) == "ai_unavailable"
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"


# Bad input: after each, the same socket answers the next good request


BAD: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("안녕", "invalid_request"),
    "nothing": ("", "invalid_request"),
    "a list": ("[]", "invalid_request"),
    "a bomb": ("[" * 60_000, "invalid_request"),
    "no type": ('{"data": {"message": "가"}}', "invalid_request"),
    "a type that is a number": ('{"type": 1}', "invalid_request"),
    "no data": ('{"type": "request_ai_response"}', "invalid_request"),
    "data that is a string": ('{"type": "request_ai_response", "data": "가"}', "invalid_request"),
    "no message": ('{"type": "request_ai_response", "data": {}}', "invalid_request"),
    "a message that is a list": ('{"type": "request_ai_response", "data": {"message": ["가"]}}', "invalid_request"),
    "blanks": ('{"type": "request_ai_response", "data": {"message": " \\ufeff\\n\\u3000"}}', "empty_message"),
    "2,001 characters": (
        json.dumps({"type": "request_ai_response", "data": {"message": "가" * 2001}}),
        "message_too_long",
    ),
    "a binary frame": (b'{"type": "ping"}', "invalid_request"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_frame_is_refused_to_its_sender_and_costs_nothing(
    counsellor: ScriptedCounsellor, tmp_path: Path, name: str
) -> None:
    bad, code = BAD[name]
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_AI_REQUESTS_PER_MINUTE=1)
    async with serve(settings, counsellor) as server, server.connect() as client, server.connect() as other:
        await (client.ws.send_bytes(bad) if isinstance(bad, bytes) else client.ws.send_str(bad))
        frame = await client.frame()
        assert error_of(frame) == code
        assert set(frame) == {"type", "data", "code"}
        await client.ask("가" * 2000)
        assert kinds_of(await client.reply())[-1] == "complete"
        assert kinds_of(await other.reply())[-1] == "complete"  # and not the error


ODD = [
    "😥👨‍👩‍👧‍👦🏳️‍🌈",
    "한글",  # decomposed
    "ㅠㅠㅋㅋ",
    "\u202e뒤집힌\u202c",
    "\u200b보이지 않는",
    "‹\u2028›\u2029끝",
    "𠮷野家",
    "\U0010ffff\ufdd0\uffff",
    "\x01\x1b[31m\x7f\x85",
    "a\u0301" * 50,
    "<script>alert(1)</script>",
    '"\\/\b\f\n\r\t끝',
    "'; DROP TABLE conversations; --",
]


async def test_any_unicode_is_answered_and_stored(server: Server) -> None:
    async with server.connect() as client:
        for message in ODD:
            await client.ask(message)
            frames = await client.reply()
            assert kinds_of(frames)[-1] == "complete"
            assert text_of(frames) == f"들은 말: {message}"
        await client.ws.send_str('{"type": "request_ai_response", "data": {"message": "\\ud83d가\\u0000"}}')
        assert text_of(await client.reply()) == "들은 말: \ufffd가\ufffd"
    assert [row[0] for row in await server.rows()] == [*ODD, "\ufffd가\ufffd"]


async def test_half_characters_in_a_reply_do_not_break_it(server: Server, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().say("가\ud83d", "", "\0나").end()
    async with server.connect() as client:
        await client.ask()
        frames = await client.reply()
    assert text_of(frames) == "가\ufffd\ufffd나"
    assert all(frame["data"]["chunk"] for frame in frames if frame["type"] == "ai_stream_chunk")


async def test_odd_emotions_and_timestamps_stand_between_nobody_and_a_reply(server: Server) -> None:
    odd = [("joy", "soon"), (3, -1), ({}, []), (True, False), ("HAPPY", 2**63), (None, None), ([], 1.5)]
    before = int(time.time() * 1000)
    async with server.connect() as client:
        for emotion, timestamp in odd:
            await client.ask(emotion=emotion, timestamp=timestamp)
            assert kinds_of(await client.reply())[-1] == "complete"
    rows = await server.rows()
    assert [row[2] for row in rows] == [None] * len(odd)
    assert all(before <= row[3] <= time.time() * 1000 for row in rows)


@pytest.mark.parametrize(("size", "closed"), [(64 * 1024, False), (64 * 1024 + 1, True), (100_000, True)])
async def test_frames_of_over_64_kib_close_the_socket(server: Server, size: int, closed: bool) -> None:
    async with server.connect() as client:
        await client.ws.send_str(json.dumps({"type": "status_update", "data": ""}).ljust(size))
        if closed:
            assert await client.closed() == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        else:
            await client.silent()
    async with server.connect() as client:
        await client.silent()


async def test_a_frame_of_4_mib_closes_the_socket_before_it_is_read(server: Server) -> None:
    async with server.connect() as client:
        with contextlib.suppress(ConnectionError):  # cut off while it still sends
            await client.ws.send_str(" " * 4 * 1024 * 1024)
        assert await client.closed() in (aiohttp.WSCloseCode.MESSAGE_TOO_BIG, aiohttp.WSCloseCode.ABNORMAL_CLOSURE)
    async with server.connect() as client:
        await client.silent()


# Order


async def test_refusals_come_in_their_turn(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        await talk.asked.wait()
        await client.ask(" ")
        await client.ws.send_bytes(b"x")
        await client.ask("둘")
        await client.silent()
        talk.say("첫째").end()
        assert kinds_of(await client.reply()) == COMPLETE
        assert error_of(await client.frame()) == "empty_message"
        assert error_of(await client.frame()) == "invalid_request"
        assert text_of(await client.reply()) == "들은 말: 둘"


async def test_requests_of_two_sockets_are_answered_one_after_another_to_both(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as one, server.connect() as two:
        await one.ask("하나")
        await talk.asked.wait()
        await two.ask("둘")
        await two.silent()
        talk.say("첫째").end()
        for client in (one, two):
            frames = await client.reply() + await client.reply()
            assert kinds_of(frames) == [*COMPLETE, "begin", *["chunk"] * (len(frames) - 5), "complete"]
            assert text_of(frames) == "첫째들은 말: 둘"


async def test_sessions_do_not_wait_for_each_other_nor_hear_each_other(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect("가") as one, server.connect("나") as two:
        await one.ask()
        await talk.asked.wait()
        await two.ask("내 말")
        assert text_of(await two.reply()) == "들은 말: 내 말"
        await one.silent()
        talk.say("네 답").end()
        assert text_of(await one.reply()) == "네 답"
        await two.silent()


async def test_sixteen_frames_wait_and_one_more_closes_its_socket(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as greedy, server.connect() as other:
        await greedy.ask("답하는 중")
        await talk.asked.wait()
        await other.ask("다른 창")
        await other.silent()
        for number in range(15):
            await greedy.ask(f"기다림 {number}")
        await greedy.silent()
        await greedy.ask("하나 더")
        assert await greedy.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION
        talk.say("첫째").end()
        assert text_of(await other.reply()) == "첫째"
        assert text_of(await other.reply()) == "들은 말: 다른 창"
        await other.silent()
        await other.ask("다음")
        assert text_of(await other.reply()) == "들은 말: 다음"


# Rate and session


async def test_the_rate_is_held_and_the_refusal_says_how_long(tmp_path: Path) -> None:
    clock = [1_800_000_000.0]
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_AI_REQUESTS_PER_MINUTE=2)
    async with serve(settings, ScriptedCounsellor(), clock=lambda: clock[0]) as server:
        async with server.connect() as client:
            for expected in ("complete", "complete", "error"):
                await client.ask()
                frames = await client.reply()
                assert kinds_of(frames)[-1] == expected
            assert (error_of(frames[-1]), frames[-1]["retry_after_ms"]) == ("rate_limited", 30_000)
            assert set(frames[-1]) == {"type", "data", "code", "retry_after_ms"}
        async with server.connect() as client:  # not by reconnecting
            await client.ask()
            assert error_of((await client.reply())[-1]) == "rate_limited"
            clock[0] += 30
            await client.ask()
            assert kinds_of(await client.reply())[-1] == "complete"


async def test_an_unknown_session_opens_and_its_requests_are_refused(database_url: str) -> None:
    settings = make_settings(database_url, AUTO_CREATE_SESSIONS=0)
    async with serve(settings, ScriptedCounsellor()) as server, server.connect("없는 세션") as client:
        await client.ask()
        frame = await client.frame()
        assert error_of(frame) == "session_expired"
        assert "seq" not in frame
        await server.storage.create_session("없는 세션")
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"


async def test_a_session_deleted_while_its_reply_streams_is_expired(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        talk.say("가")
        assert kinds_of([await client.frame(), await client.frame()]) == ["begin", "chunk"]
        await server.storage.fetch("DELETE FROM sessions")
        talk.end()
        assert error_of((await client.reply())[-1]) == "session_expired"
        assert await server.rows() == []
        await client.ask()
        assert error_of(await client.frame()) == "session_expired"


# Cancel


async def test_a_cancel_stops_the_reply_and_stores_what_was_shown(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        talk.say("가", "나")
        shown = ""
        while shown != "가나":
            shown += (await client.frame())["data"].get("chunk", "")
        await client.ask("기다리던 말")
        await client.send("cancel_ai_response")
        frame = await client.frame()
        assert (frame["type"], frame["interrupted"]) == ("ai_stream_complete", True)
        await talk.closed.wait()
        await client.silent()  # the waiting one was withdrawn
        await client.ask("다음")
        assert text_of(await client.reply()) == "들은 말: 다음"
    assert [row[:2] for row in await server.rows()] == [("하나", "가나"), ("다음", "들은 말: 다음")]


async def test_a_cancel_before_the_first_text_completes_without_a_begin_and_stores_nothing(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        await talk.asked.wait()
        await client.send("cancel_ai_response")
        (frame,) = await client.reply()
        assert frame["interrupted"] is True
        await talk.closed.wait()
        for _ in range(12):  # in the same breath as the request
            await client.ask()
            await client.send("cancel_ai_response")
            frames = await client.reply()
            assert frames[-1]["type"] == "ai_stream_complete"
    assert all(row[1] for row in await server.rows())


async def test_a_cancel_with_nothing_in_progress_is_ignored(server: Server) -> None:
    async with server.connect() as client:
        await client.send("cancel_ai_response")
        await client.silent()
        await client.ask()
        frames = await client.reply()
        assert "interrupted" not in frames[-1]
        await client.send("cancel_ai_response")
        await client.silent()


async def test_a_cancel_does_not_wait_for_the_gap(tmp_path: Path) -> None:
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", STREAM_CHUNK_INTERVAL_MS=5000)
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask()
        talk.say("가")
        await client.frame()
        await client.frame()
        talk.say("나").end()
        await until(lambda: talk.closed.is_set())
        asked = time.monotonic()
        await client.send("cancel_ai_response")
        assert kinds_of(await client.reply()) == ["complete"]
        assert time.monotonic() - asked < 2.5
        assert [row[1] for row in await server.rows()] == ["가"]


async def test_barge_in_makes_a_new_request_stop_the_reply(tmp_path: Path) -> None:
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", BARGE_IN=1)
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask("하나")
        talk.say("가")
        await client.frame()
        await client.frame()
        await client.ask(" ")  # a bad frame interrupts nobody
        await client.silent()
        await client.ask("둘")
        frames = await client.reply()
        assert frames[-1]["interrupted"] is True
        assert error_of(await client.frame()) == "empty_message"
        assert text_of(await client.reply()) == "들은 말: 둘"


# End to end


async def test_the_demo_answers_the_specifications_request(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", STREAM_CHUNK_INTERVAL_MS=50)
    async with serve(settings, Demo()) as server, server.connect("test-session-123") as client:
        await client.ask("요즘 너무 불안해요", emotion="anxious", timestamp=1704902400000)
        frames = await client.reply()
        assert kinds_of(frames)[0] == "begin"
        assert kinds_of(frames)[-1] == "complete"
        assert kinds_of(frames).count("chunk") >= 5
        assert await server.rows("test-session-123") == [
            ("요즘 너무 불안해요", text_of(frames), "anxious", 1704902400000)
        ]


async def test_gemini_answers_with_ten_turns_of_history(gemini: GeminiStandIn, database_url: str) -> None:
    settings = make_settings(
        database_url,
        DEMO_MODE=0,
        GEMINI_API_KEY="k",
        GEMINI_BASE_URL=gemini.url,
        AUTO_CREATE_SESSIONS=1,
        MAX_AI_REQUESTS_PER_MINUTE=60,
    )
    gemini.default = stream(event("네, "), event("그러셨군요."), event("", "STOP"))
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        for number in range(11):
            await client.ask(f"말 {number}", emotion="anxious")
            assert text_of(await client.reply()) == "네, 그러셨군요."
    body = gemini.requests[-1]["body"]
    assert len(body["contents"]) == 21
    assert body["contents"][0] == {"role": "user", "parts": [{"text": "말 0"}]}
    assert body["systemInstruction"]["parts"][0]["text"] == system_prompt(Emotion.ANXIOUS)
    assert body["generationConfig"]["maxOutputTokens"] == 200
