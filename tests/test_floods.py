"""One client that sends too much, or a model that never ends, costs nobody else anything; all is answered."""

import asyncio
import contextlib
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from standin import GeminiStandIn, event
from support import Client, ScriptedCounsellor, Server, Talk, kinds_of, make_settings, send_together, serve, text_of
from tools import PATIENCE, until

import bemore_voice
from bemore.care import FIRST, Signal, signal_in
from bemore_voice import make_counsellor

REQUEST = ("request_ai_response", {"message": "안녕하세요"})
CANCEL = ("cancel_ai_response", None)
LONG = ("request_ai_response", {"message": "가나다라마" * 400})


async def test_a_request_with_a_cancel_right_behind_it_is_answered_also_just_after_an_interrupted_complete(
    server: Server,
) -> None:
    for number in range(20):  # each within its budget of frames
        async with server.connect(str(number)) as client:
            for _ in range(20):
                await send_together(client, REQUEST, CANCEL)
                frames = await client.reply()
                assert kinds_of(frames) == ["complete"]
                assert frames[-1]["interrupted"] is True


FLOODS = {
    "long requests, each with a cancel": [LONG, CANCEL],
    "pings": [("ping", None)],
    "cancels": [CANCEL],
    "bad frames": [("", None)],
    "empty messages": [("request_ai_response", {"message": " "}), CANCEL],
    "frames of no known type": [("hello", None)],
}


@pytest.mark.parametrize("frames", FLOODS.values(), ids=FLOODS)
async def test_a_flood_is_cut_at_its_sockets_budget(
    server: Server, caplog: pytest.LogCaptureFixture, frames: list[tuple[str, object]]
) -> None:
    caplog.set_level("INFO", "bemore_voice")
    async with server.connect("flooding") as flooding, server.connect("other") as other:
        with contextlib.suppress(ConnectionError):
            for kind, data in frames * 200:
                await flooding.send(kind, data)
        assert await flooding.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION
        await other.silent()
    await until(lambda: not any(session.task for session in server.sessions))
    assert len(caplog.records) <= bemore_voice.FRAMES_AT_ONCE + 1


async def test_coming_again_renews_no_budget(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that a socket was closed of lets the next one in after a while; its others stay as they are."""
    monkeypatch.setattr(bemore_voice, "SHUT_SECONDS", 0.5)
    loop = asyncio.get_running_loop()
    async with server.connect() as other, server.connect("elsewhere"):
        async with server.connect() as flooding:
            await send_together(flooding, *[("", None)] * 100)
            assert await flooding.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION
        closed = loop.time()
        await other.silent()
        async with server.connect("elsewhere") as elsewhere:
            await elsewhere.silent()
        async with server.connect() as again:
            assert loop.time() - closed > 0.4
            await again.ask()
            assert kinds_of(await again.reply())[-1] == "complete"


async def test_what_comes_in_one_packet_leaves_others_their_turn(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pong does not wait for the flood that was there before the ping."""
    read: list[str] = []

    def count(message: str) -> object:
        read.append(message)
        return signal_in(message)

    monkeypatch.setattr(bemore_voice, "signal_in", count)
    async with contextlib.AsyncExitStack() as stack:
        flooding = [await stack.enter_async_context(server.connect(str(number))) for number in range(5)]
        other = await stack.enter_async_context(server.connect("other"))
        for client in flooding:
            await send_together(client, *[LONG, CANCEL] * 5)
        await until(lambda: read)
        await other.silent()
        assert len(read) < 20
        await until(lambda: len(read) == 25)


async def test_long_messages_count_for_more(server: Server) -> None:
    async with server.connect() as client:
        await send_together(client, *[LONG] * 13)
        assert await client.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION


PLEA = ("request_ai_response", {"message": "죽고 싶어요"})


@pytest.mark.parametrize(
    "before", [[REQUEST] * 30, [("ping", None)] * 60, [("", None)] * 70], ids=["requests", "pings", "bad frames"]
)
@pytest.mark.parametrize("place", ["behind", "in front of", "long, and behind"])
async def test_a_plea_around_a_flood_in_one_packet_is_answered_before_the_goodbye(
    server: Server, counsellor: ScriptedCounsellor, before: list[tuple[str, object]], place: str
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        await talk.asked.wait()
        if place == "behind":
            await send_together(client, *before, PLEA, PLEA, REQUEST)
        elif place == "in front of":
            await send_together(client, PLEA, *before, *before)
        else:
            words = {"message": "오늘 있었던 일을 말하자면 " * 130 + "죽고 싶어요"}
            await send_together(client, *before[:57], ("request_ai_response", words), *before)
        shown = ""
        while not client.ws.closed:
            message = await client.ws.receive(timeout=PATIENCE)
            shown += message.data if message.type is aiohttp.WSMsgType.TEXT else ""
        assert FIRST[Signal.EXPLICIT] in shown
        assert client.ws.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION


PIECES = [f"{number} " for number in range(120)]  # 20 ms apart they take more than two seconds
LENGTH = "".join(PIECES)


async def hear_at_length(client: Client, talk: Talk) -> None:
    """Ask, and hear a long reply, which does not end, as it is said."""
    await client.ask("하나")
    for piece in PIECES:
        talk.say(piece)
        while (await client.frame())["type"] != "ai_stream_chunk":
            pass


async def test_a_plea_just_before_the_connection_is_lost_does_not_wait_behind_what_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "PLEA_WAITS_SECONDS", 0.5)
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", STREAM_CHUNK_INTERVAL_MS=20)
    async with serve(settings, counsellor) as server:
        talk = counsellor.expect()
        async with server.connect() as lost:
            await hear_at_length(lost, talk)
            await send_together(lost, PLEA)
            await lost.cut()
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with server.connect() as client:
            assert text_of(await client.reply()) == LENGTH
            assert kinds_of([await client.frame()]) == ["begin"]
            assert FIRST[Signal.EXPLICIT] in (await client.frame())["data"]["chunk"]
        assert loop.time() - began < 1.5


@pytest.mark.parametrize("kind", ["plea", "cancel"])
async def test_what_must_not_wait_does_not_wait_behind_a_reply_that_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A page comes back in the middle of a long reply, whose frames it is sent 20 ms apart."""
    monkeypatch.setattr(bemore_voice, "PLEA_WAITS_SECONDS", 0.5)  # for the long reply's row, on a busy machine too
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", STREAM_CHUNK_INTERVAL_MS=20)
    async with serve(settings, counsellor) as server:
        talk = counsellor.expect()
        async with server.connect() as steady:
            await hear_at_length(steady, talk)
            async with server.connect() as client:
                loop = asyncio.get_running_loop()
                asked = loop.time()
                await send_together(client, PLEA if kind == "plea" else CANCEL)
                frames = await client.reply()
                assert text_of(frames) == LENGTH
                assert frames[-1]["interrupted"] is True
                if kind == "plea":
                    assert kinds_of([await client.frame()]) == ["begin"]
                    assert FIRST[Signal.EXPLICIT] in (await client.frame())["data"]["chunk"]
                assert loop.time() - asked < 1.5


async def test_of_a_flood_that_goes_on_no_more_is_read(server: Server) -> None:
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(
        b"GET /ws/session/s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    sent = 0
    with contextlib.suppress(ConnectionError):  # which must come, and soon
        async with asyncio.timeout(PATIENCE):
            while True:
                writer.write(b"\x89\x80\0\0\0\0" * 10_000)  # empty pings
                sent += 60_000
                await writer.drain()
    assert sent < 50_000_000  # what the kernel takes
    writer.transport.abort()


async def test_a_reply_without_end_is_cut_and_complete(gemini: GeminiStandIn, tmp_path: Path) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(event("끝없이 이어지는 말 " * 100))

    gemini.answers.append(endless)
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", DEMO_MODE=0, GEMINI_API_KEY="k", GEMINI_BASE_URL=gemini.url)
    async with serve(settings, make_counsellor(settings)) as server, server.connect() as client:
        await client.ask()
        frames = await client.reply()
        assert frames[-1]["type"] == "ai_stream_complete"
        assert len(text_of(frames)) == bemore_voice.MAX_REPLY_CHARACTERS
        await until(lambda: gemini.ended == 1)  # nobody listens to the rest
        assert [row[1] for row in await server.rows()] == [text_of(frames)]
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"


# Clocks


async def test_a_clock_that_is_set_back_takes_nobody_back(counsellor: ScriptedCounsellor, tmp_path: Path) -> None:
    now = [1_800_000_000.0]
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_AI_REQUESTS_PER_MINUTE=10)
    async with serve(settings, counsellor, clock=lambda: now[0]) as server:
        async with server.connect() as client:
            await client.ask()
            last = (await client.reply())[-1]["seq"]
        await until(lambda: not server.sessions)  # nothing of the session is left in memory
        now[0] -= 600
        async with server.connect() as client:
            await client.ask()
            refused = (await client.reply())[-1]
            assert (refused["code"], refused["retry_after_ms"]) == ("rate_limited", 6000)
            now[0] += 6
            await client.ask()
            frames = await client.reply()
            assert frames[-1]["type"] == "ai_stream_complete"
            assert frames[0]["seq"] > last
