"""The end of the process: replies end, risk signals are answered, sockets are closed with 1001."""

import asyncio
from pathlib import Path

import aiohttp
from aiohttp import WSCloseCode
from support import ScriptedCounsellor, Server, Serving, is_listening, kinds_of, masked, started, text_of
from tools import PATIENCE, open_storage

from bemore.care import FIRST, Signal
from bemore_voice import Limits

EXPLICIT = "요즘은 그냥 죽고 싶다는 생각만 들어요"
INDIRECT = "제가 없어지면 다들 편해질 거예요"


async def test_reply_in_progress_ends_before_the_goodbye(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    """Also what waits for its gap is sent."""
    talk = counsellor.expect()
    async with serving(STREAM_CHUNK_INTERVAL_MS=50) as server, server.connect() as client:
        await client.ask()
        await talk.asked.wait()
        async with server.stopping():
            await client.silent()  # pings are answered
            talk.say("하나").end()
            assert kinds_of(await client.reply()) == ["begin", "chunk", "complete"]
            assert await client.closed() == WSCloseCode.GOING_AWAY


async def test_reply_that_does_not_end_is_interrupted(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("가")
    async with serving(limits=Limits(drain_seconds=0.3)) as server, server.connect() as client:
        await client.ask("하나")
        await client.begun()
        async with server.stopping():
            await client.ask("너무 늦은 말")
            frames = await client.reply()
            assert (kinds_of(frames), frames[-1]["interrupted"]) == (["complete"], True)
            assert (await client.frame())["code"] == "ai_unavailable"
            assert await client.closed() == WSCloseCode.GOING_AWAY
        assert talk.closed.is_set()
    async with serving() as server:
        assert [row[:2] for row in await server.rows()] == [("하나", "가")]


async def test_cancel_is_heard_while_the_server_stops(server: Server, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().say("가")
    async with server.connect() as client:
        await client.ask("하나")
        await client.begun()
        async with server.stopping():
            await client.cancel()
            assert (await client.reply())[-1]["interrupted"] is True
            assert await client.closed() == WSCloseCode.GOING_AWAY


async def test_waiting_and_new_requests_are_refused_but_for_signals(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        await talk.asked.wait()
        await client.ask("둘")
        await client.ask(INDIRECT)
        await client.silent()
        async with server.stopping():
            await client.ask("셋")
            await client.silent()
            talk.say("첫째").end()
            assert text_of(await client.reply()) == "첫째"
            assert (await client.frame())["code"] == "ai_unavailable"
            assert text_of(await client.reply()) == FIRST[Signal.INDIRECT]
            assert (await client.frame())["code"] == "ai_unavailable"
            assert await client.closed() == WSCloseCode.GOING_AWAY
    assert len(counsellor.prompts) == 1


async def test_signal_while_the_program_stops_is_answered_and_stored(tmp_path: Path) -> None:
    async with started(tmp_path) as program:
        async with program.connect() as client:
            await client.ask("하나")
            await client.begun()
            program.process.terminate()
            while await is_listening(program.port):
                pass
            await client.ask(EXPLICIT)
            assert (await client.reply())[-1]["interrupted"] is True
            frames = await client.reply()
            assert text_of(frames) == FIRST[Signal.EXPLICIT]
            assert kinds_of(frames)[-1] == "complete"
            assert await client.closed() == aiohttp.WSCloseCode.GOING_AWAY
        assert await program.end() == 0
    async with open_storage(f"sqlite:///{tmp_path}/bemore.db") as storage:
        assert (await storage.conversations("s", 1, 2**53))[0]["ai_response"] == FIRST[Signal.EXPLICIT]


async def test_both_say_goodbye_once(server: Server) -> None:
    async with server.knock() as peer:
        await peer.open("/ws/session/s")
        async with server.stopping():
            assert await peer.close_code() == WSCloseCode.GOING_AWAY
            peer.send(masked(WSCloseCode.GOING_AWAY.to_bytes(2, "big"), aiohttp.WSMsgType.CLOSE))
            assert await peer.end() == b""


async def test_client_that_says_no_goodbye_holds_nothing_up(serving: Serving) -> None:
    async with serving(limits=Limits(close_seconds=0.2)) as server, server.knock() as peer, asyncio.timeout(PATIENCE):
        await peer.open("/ws/session/s")
        peer.transport.pause_reading()
        async with server.stopping():
            pass
