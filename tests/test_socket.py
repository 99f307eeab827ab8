"""The protocol, on a running server with a scripted counsellor."""

import asyncio
import contextlib
import json
import statistics
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType
from standin import GeminiStandIn, event, stream
from support import (
    TIME_SCALE,
    Frame,
    RawPeer,
    ScriptedCounsellor,
    Server,
    Serving,
    kinds_of,
    text_of,
)

from bemore.counsellor import Emotion, Failed
from bemore.failures import ErrorCode
from bemore_voice import SENTENCES, Limits, system_prompt

COMPLETE = ["begin", "chunk", "complete"]


def error_of(frame: Frame) -> str:
    assert frame["type"] == "ai_stream_error"
    assert frame["data"] == {"error": SENTENCES[ErrorCode(frame["code"])]}
    return str(frame["code"])


# One request


async def test_reply_is_begin_chunks_complete_and_a_row(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("불안해요", emotion="anxious", timestamp=1704902400000)
        for word in ("네, ", "그러", "셨군요."):
            await talk.say(word).heard()
        talk.end()
        frames = await client.reply()
    assert kinds_of(frames) == ["begin", "chunk", "chunk", "chunk", "complete"]
    assert [frame["data"] for frame in frames] == [{}, {"chunk": "네, "}, {"chunk": "그러"}, {"chunk": "셨군요."}, {}]
    assert all(set(frame) == {"type", "data", "seq"} for frame in frames)
    assert await server.rows() == [("불안해요", "네, 그러셨군요.", "anxious", 1704902400000)]
    assert talk.prompt is not None
    assert (talk.prompt.message, talk.prompt.emotion, list(talk.prompt.history)) == ("불안해요", Emotion.ANXIOUS, [])


async def test_begin_waits_for_the_first_text(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        await talk.asked.wait()
        await client.silent()
        talk.say("가").end()
        assert kinds_of(await client.reply()) == COMPLETE


async def test_complete_waits_for_the_row(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        await talk.asked.wait()
        free = server.faults.hang()
        talk.say("가").end()
        await client.begun()
        await client.silent()
        free.set()
        assert kinds_of(await client.reply()) == ["complete"]
    assert [row[1] for row in await server.rows()] == ["가"]


async def test_seq_starts_from_the_clock_and_grows(server: Server) -> None:
    before = int(time.time() * 1e6)
    async with server.connect() as client:
        for _ in range(3):
            await client.ask()
            await client.reply()
    seqs = [frame["seq"] for frame in client.frames]
    assert before < seqs[0]
    assert seqs[-1] < 2**53
    assert seqs == sorted(set(seqs))


async def test_ping_is_answered_during_a_reply(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("가")
    async with server.connect() as client:
        await client.ask()
        await client.begun()
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


class TimedPeer(RawPeer):
    """Notes when each frame of a reply came, by the clock of the server's own loop."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []
        self.times: list[float] = []

    def take(self, opcode: int, payload: bytes) -> None:
        super().take(opcode, payload)
        if opcode == WSMsgType.TEXT:
            self.kinds += kinds_of([json.loads(payload)])
            self.times.append(asyncio.get_running_loop().time())


async def test_frames_of_a_reply_are_20_ms_apart(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    """Of two frames that come within one render, React's hook loses the first; also where they are sent again."""
    counsellor.expect().say("하나", "둘", "셋").end()
    gaps = []
    async with serving(STREAM_CHUNK_INTERVAL_MS=5) as server, server.connect() as lost:
        await lost.ask()
        await lost.cut()
        await server.until_idle()
        for _ in range(2):
            peer = await TimedPeer.connect(server.address)
            await peer.open("/ws/session/가")
            while "complete" not in peer.kinds:
                await peer.frame()
            gaps += [after - before for before, after in zip(peer.times, peer.times[1:], strict=False)]
            peer.abort()
    assert len(gaps) >= 4
    assert statistics.median(gaps) > 0.019


async def test_failed_reply_ends_in_one_error(server: Server, counsellor: ScriptedCounsellor) -> None:
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


@pytest.mark.parametrize("bug", [KeyError("a secret that a person said"), asyncio.CancelledError()], ids=repr)
async def test_unexpected_exception_ends_in_one_error(
    server: Server, counsellor: ScriptedCounsellor, bug: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async with server.connect() as client:
        counsellor.expect().fail(bug)
        await client.ask("a secret that a person said")
        assert error_of((await client.reply())[-1]) == "ai_unavailable"
        await client.ask("다시")
        assert kinds_of(await client.reply())[-1] == "complete"
    assert type(bug).__name__ in caplog.text
    assert "secret" not in caplog.text


# Bad input: after each, the same socket answers the next good request


BAD: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("안녕", "invalid_request"),
    "a list": ("[]", "invalid_request"),
    "a bomb": ("[" * 20_000, "invalid_request"),
    "no message": ('{"type": "request_ai_response", "data": {}}', "invalid_request"),
    "blanks": ('{"type": "request_ai_response", "data": {"message": " \\ufeff\\n\\u3000"}}', "empty_message"),
    "2,001 characters": (
        f'{{"type": "request_ai_response", "data": {{"message": "{"가" * 2001}"}}}}',
        "message_too_long",
    ),
    "a binary frame": (b'{"type": "ping"}', "invalid_request"),
}


async def test_bad_frame_is_refused_to_its_sender_for_no_token(serving: Serving) -> None:
    async with serving(MAX_AI_REQUESTS_PER_MINUTE=1) as server, server.connect() as client, server.connect() as other:
        for bad, code in BAD.values():
            await (client.ws.send_bytes(bad) if isinstance(bad, bytes) else client.ws.send_str(bad))
            frame = await client.frame()
            assert error_of(frame) == code
            assert set(frame) == {"type", "data", "code"}
        await client.ask("가" * 2000)
        assert kinds_of(await client.reply())[-1] == "complete"
        assert kinds_of(await other.reply())[-1] == "complete"
        assert kinds_of(other.frames)[0] == "begin"


ODD = [
    "😥👨‍👩‍👧‍👦🏳️‍🌈",
    "ㅠㅠㅋㅋ",
    "\u202e뒤집힌\u202c",
    "\u200b보이지 않는",
    "‹\u2028›\u2029끝",
    "𠮷野家",
    "\U0010ffff\ufdd0\uffff",
    "\x01\x1b[31m\x7f\x85",
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


async def test_half_characters_in_a_reply_are_replaced(server: Server, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().say("가\ud83d", "", "\0나").end()
    async with server.connect() as client:
        await client.ask()
        frames = await client.reply()
    assert text_of(frames) == "가\ufffd\ufffd나"
    assert all(frame["data"]["chunk"] for frame in frames if frame["type"] == "ai_stream_chunk")


async def test_frame_of_over_64_kib_closes_the_socket(server: Server) -> None:
    async with server.connect() as client:
        await client.ws.send_str(json.dumps({"type": "status_update", "data": ""}).ljust(64 * 1024))
        await client.silent()
        await client.ws.send_str(json.dumps({"type": "status_update", "data": ""}).ljust(64 * 1024 + 1))
        assert await client.closed() == aiohttp.WSCloseCode.MESSAGE_TOO_BIG


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


async def test_requests_of_two_sockets_are_answered_in_order(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as one, server.connect() as two:
        await one.ask("하나")
        await talk.asked.wait()
        await two.ask("둘")
        await two.silent()
        talk.say("첫째").end()
        for client in (one, two):
            assert [text_of(await client.reply()) for _ in range(2)] == ["첫째", "들은 말: 둘"]
    assert one.frames == two.frames


async def test_sessions_neither_wait_for_nor_hear_each_other(server: Server, counsellor: ScriptedCounsellor) -> None:
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


# Rate and session


async def test_rate_is_kept_and_the_refusal_says_how_long(serving: Serving) -> None:
    clock = [1_800_000_000.0]
    async with serving(MAX_AI_REQUESTS_PER_MINUTE=2, clock=lambda: clock[0]) as server:
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


async def test_clock_that_steps_back_locks_no_session_out(serving: Serving) -> None:
    clock = [1_800_000_000.0]
    async with serving(MAX_AI_REQUESTS_PER_MINUTE=10, clock=lambda: clock[0]) as server:
        async with server.connect() as client:
            await client.ask()
            last = (await client.reply())[-1]["seq"]
        await server.until_forgotten()
        clock[0] -= 600
        async with server.connect() as client:
            await client.ask()
            frames = await client.reply()
            assert frames[-1]["type"] == "ai_stream_complete"
            assert frames[0]["seq"] > last


async def test_unknown_session_opens_and_is_refused(serving: Serving) -> None:
    async with serving(AUTO_CREATE_SESSIONS=0) as server, server.connect("없는 세션") as client:
        await client.ask()
        frame = await client.frame()
        assert error_of(frame) == "session_expired"
        assert "seq" not in frame
        await server.storage.create_session("없는 세션")
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"


async def test_session_is_created_by_its_first_request(server: Server) -> None:
    async with server.connect() as client:
        await client.silent()
        assert not list(await server.storage.fetch("SELECT * FROM sessions"))
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"
        assert len(list(await server.storage.fetch("SELECT * FROM sessions"))) == 1


async def test_session_deleted_elsewhere_during_a_reply_expires(
    serving: Serving, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect().say("가")
    async with serving(AUTO_CREATE_SESSIONS=0) as server, server.connect() as client:
        await server.storage.create_session("가")
        await client.ask()
        await client.begun()
        await server.storage.fetch("DELETE FROM sessions")
        talk.end()
        assert error_of((await client.reply())[-1]) == "session_expired"
        assert await server.rows() == []
        await client.ask()
        assert error_of(await client.frame()) == "session_expired"


# Interruption


async def test_cancel_interrupts_and_stores_what_was_shown(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("가", "나")
    async with server.connect() as client:
        await client.ask("하나")
        while text_of(client.frames) != "가나":
            await client.frame()
        await client.ask("기다리던 말")
        await client.cancel()
        frame = await client.frame()
        assert (frame["type"], frame["interrupted"]) == ("ai_stream_complete", True)
        await talk.closed.wait()
        await client.silent()  # the waiting request was dropped
        await client.ask("다음")
        assert text_of(await client.reply()) == "들은 말: 다음"
    assert [row[:2] for row in await server.rows()] == [("하나", "가나"), ("다음", "들은 말: 다음")]


async def test_cancel_right_after_request_yields_one_complete(server: Server) -> None:
    """Also where the last reply was interrupted a moment ago."""
    async with server.connect() as client:
        for _ in range(12):
            await client.send_together(("request_ai_response", {"message": "가"}), ("cancel_ai_response", None))
            frames = await client.reply()
            assert kinds_of(frames) == ["complete"]
            assert frames[-1]["interrupted"] is True
        await client.silent()


async def test_cancel_takes_effect_within_50_ms(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    waits = []
    async with serving(STREAM_CHUNK_INTERVAL_MS=5000) as server, server.connect() as client:
        for _ in range(5):
            talk = counsellor.expect().say("가")
            await client.ask()
            await client.begun()
            await talk.say("나").heard()
            asked = time.perf_counter()
            await client.cancel()
            assert kinds_of(await client.reply()) == ["complete"]
            waits.append(time.perf_counter() - asked)
    assert statistics.median(waits) < 0.05 * TIME_SCALE


async def test_cancel_while_the_last_text_waits_interrupts(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    """The model has said all, and the end of it waits for the interval between two chunks."""
    talk = counsellor.expect().say("가")
    async with serving(STREAM_CHUNK_INTERVAL_MS=5000) as server, server.connect() as client:
        await client.ask("하나")
        await client.begun()
        talk.say("나").end()
        await talk.closed.wait()
        await client.silent()
        await client.cancel()
        assert (await client.frame())["interrupted"] is True
        await client.silent()
        await server.until_idle()
        assert [row[:2] for row in await server.rows()] == [("하나", "가")]


async def test_cancel_does_not_wait_for_the_database(server: Server, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().say("가")
    async with server.connect() as client:
        await client.ask("하나")
        await client.begun()
        free = server.faults.hang()
        await client.cancel()
        assert (await client.frame())["interrupted"] is True
        free.set()
        await server.until_idle()
    assert [row[:2] for row in await server.rows()] == [("하나", "가")]


async def test_barge_in_interrupts_the_reply_in_progress(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().say("가")
    async with serving(BARGE_IN=1) as server, server.connect() as client:
        await client.ask("하나")
        await client.begun()
        await client.ask(" ")  # a bad frame interrupts nothing
        await client.silent()
        await client.ask("둘")
        assert (await client.reply())[-1]["interrupted"] is True
        assert error_of(await client.frame()) == "empty_message"
        assert text_of(await client.reply()) == "들은 말: 둘"


# Floods and slow readers


async def test_flood_is_throttled_and_answered_whole(server: Server) -> None:
    """After 60 frames the server reads ten a second; another session does not notice."""
    loop = asyncio.get_running_loop()
    async with server.connect("가") as flooding, server.connect("나") as other:
        began = loop.time()
        await flooding.send_together(*[("ping", None)] * 75)
        for _ in range(60):
            assert (await flooding.frame())["type"] == "pong"
        await other.ask()
        assert kinds_of(await other.reply())[-1] == "complete"
        for _ in range(15):
            assert (await flooding.frame())["type"] == "pong"
        assert loop.time() - began > 1


async def test_flood_without_end_is_not_read(server: Server) -> None:
    async with server.knock() as peer:
        await peer.open("/ws/session/s")
        sent = 0
        with contextlib.suppress(TimeoutError):  # it may not be taken for ever
            async with asyncio.timeout(1):
                while True:
                    peer.send(b"\x89\x80\0\0\0\0" * 10_000)  # empty pings
                    sent += 60_000
                    await peer.drain()
        assert 0 < sent < 50_000_000  # what the kernel takes
        assert not peer.gone.is_set()


@pytest.mark.parametrize(
    "limits", [Limits(unsent_bytes=200_000), Limits(stall_seconds=0.1, unsent_bytes=1 << 40)], ids=["unsent", "stall"]
)
async def test_reader_that_never_reads_is_disconnected(
    serving: Serving, counsellor: ScriptedCounsellor, limits: Limits
) -> None:
    """It holds up no other reader."""
    async with serving(limits=limits, send_bytes=4096) as server, server.connect() as client:
        peer = await RawPeer.connect(server.address, receive_bytes=4096)
        await peer.open("/ws/session/가")
        peer.transport.pause_reading()
        while len(server.clients()) == 2:
            counsellor.expect().say("가" * 16_000).end()
            await client.ask()
            assert kinds_of(await client.reply()) == COMPLETE
        peer.abort()


async def test_reply_of_over_16000_characters_is_cut(serving_gemini: Serving, gemini: GeminiStandIn) -> None:
    async def endless(request: Any) -> Any:
        response = aiohttp.web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(event("끝없이 이어지는 말 " * 100))

    gemini.answers.append(endless)
    async with serving_gemini() as server, server.connect() as client:
        await client.ask()
        frames = await client.reply()
        assert frames[-1]["type"] == "ai_stream_complete"
        assert len(text_of(frames)) == 16_000
        assert [row[1] for row in await server.rows()] == [text_of(frames)]
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"
    assert gemini.ended == 2  # the rest was not waited for


# End to end


async def test_gemini_is_asked_with_ten_turns_of_history(
    serving_gemini: Serving, gemini: GeminiStandIn, database_url: str
) -> None:
    gemini.default = stream(event("네, "), event("그러셨군요."), event("", "STOP"))
    async with serving_gemini(database_url) as server, server.connect() as client:
        for number in range(11):
            await client.ask(f"말 {number}", emotion="anxious")
            assert text_of(await client.reply()) == "네, 그러셨군요."
    body = gemini.requests[-1]["body"]
    assert len(body["contents"]) == 21
    assert body["contents"][0] == {"role": "user", "parts": [{"text": "말 0"}]}
    assert body["systemInstruction"]["parts"][0]["text"] == system_prompt(Emotion.ANXIOUS)
    assert body["generationConfig"]["maxOutputTokens"] == 200
