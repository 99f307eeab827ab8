"""A reply outlives its socket: what a client with the frontend's rule ends up with."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSCloseCode, WSMsgType
from support import Client, ScriptedCounsellor, Server, Wire, kinds_of, make_settings, send_together, serve, text_of
from tools import until

import bemore_voice
from bemore.counsellor import Failed
from bemore_voice import FRAMES_AT_ONCE, Socket, make_storage

IMPATIENT = aiohttp.ClientWSTimeout(ws_close=0.1)
WORDS = [f"낱말{number} " for number in range(20)]


class Frontend:
    """What the real frontend keeps: the frames whose seq it has not seen, across its own reconnects."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.frames: list[dict[str, Any]] = []

    def take(self, frame: dict[str, Any]) -> None:
        if frame.get("seq") not in self.seen:
            self.frames.append(frame)
        if "seq" in frame:
            self.seen.add(frame["seq"])

    async def read(self, client: Client, until_: Callable[[], bool]) -> None:
        while not until_():
            self.take(await client.frame())

    def chunks(self) -> int:
        return kinds_of(self.frames).count("chunk")

    def ended(self) -> bool:
        return bool(self.frames) and kinds_of(self.frames)[-1] in ("complete", "error")

    def check(self) -> None:
        assert text_of(self.frames) == "".join(WORDS)
        assert kinds_of(self.frames) == ["begin", *["chunk"] * len(WORDS), "complete"]


async def speak(talk: Any, words: list[str], server: Server) -> None:
    """Say each word after the one before it has become a chunk, so that every boundary is one."""
    for word in words:
        session = server.session()
        before = session.seq
        talk.say(word)
        await until(lambda: session.seq > before)  # noqa: B023 - awaited at once


async def freeze(_: Client, wire: Wire) -> None:
    wire.freeze()


Cut = Callable[[Client, Wire], Awaitable[object]]
CUTS: dict[str, Cut] = {
    "with a close frame": lambda client, _: client.ws.close(),
    "without a close frame": lambda client, _: client.cut(),
    "with nobody noticing": freeze,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("back", ["before the end", "after the end"])
async def test_cut_at_every_chunk_boundary_the_text_ends_up_the_same(tmp_path: Path, cut: str, back: str) -> None:
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_AI_REQUESTS_PER_MINUTE=6000)
    async with serve(settings, counsellor) as server:
        for boundary in range(len(WORDS) + 1):
            async with AsyncExitStack() as stack, Wire(lambda: asyncio.open_connection(*server.address)) as wire:
                talk, page = counsellor.expect(), Frontend()
                url = f"http://127.0.0.1:{wire.port}/ws/session/가"
                client = await Client(server.http, url, timeout=IMPATIENT).open()
                await client.ask(f"말 {boundary}")
                await talk.asked.wait()
                if boundary:
                    await speak(talk, WORDS[:boundary], server)
                    await page.read(client, lambda: page.chunks() == boundary)  # noqa: B023
                await CUTS[cut](client, wire)
                if cut != "with nobody noticing":
                    await until(lambda: not server.session().sockets)
                if back == "before the end":
                    client = await stack.enter_async_context(server.connect())
                    await speak(talk, WORDS[boundary:], server)
                    talk.end()
                else:
                    await speak(talk, WORDS[boundary:], server)
                    talk.end()
                    await until(lambda: server.session().worker is None)
                    client = await stack.enter_async_context(server.connect())
                await page.read(client, page.ended)
                page.check()
                await client.silent()
                wire.cut()
            await until(lambda: not server.sessions or not server.session().sockets)
            async with server.connect() as fresh:  # a page loaded afterwards gets nothing again
                await fresh.silent()
        assert [row[1] for row in await server.rows()] == ["".join(WORDS)] * (len(WORDS) + 1)


async def test_what_was_written_but_never_arrived_is_sent_again(tmp_path: Path) -> None:
    """The whole reply went into the buffers of a connection that was dead already."""
    counsellor = ScriptedCounsellor()
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    async with serve(settings, counsellor) as server, Wire(lambda: asyncio.open_connection(*server.address)) as wire:
        async with server.http.ws_connect(f"http://127.0.0.1:{wire.port}/ws/session/가", timeout=IMPATIENT) as ws:
            talk = counsellor.expect()
            await ws.send_json({"type": "request_ai_response", "data": {"message": "가"}})
            await talk.asked.wait()
            wire.freeze()
            talk.say(*WORDS).end()
            await until(lambda: server.session().worker is None)
            async with server.connect() as client:
                assert text_of(await client.reply()) == "".join(WORDS)
            wire.cut()


async def test_a_page_loaded_after_the_end_gets_nothing_again(server: Server) -> None:
    async with server.connect() as client:
        await client.ask()
        await client.reply()
    async with server.connect() as client:
        await client.silent()


async def test_an_error_that_ends_a_reply_is_kept_for_a_socket_that_returns(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask()
        talk.say("가")
        await client.frame()
        await client.frame()
        await client.cut()
    await until(lambda: not server.session().sockets)
    talk.fail(Failed("test"))
    await until(lambda: server.session().worker is None)
    async with server.connect() as client:
        frames = await client.reply()
        assert kinds_of(frames) == ["begin", "chunk", "error"]
        assert frames[-1]["code"] == "ai_unavailable"
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"


async def test_requests_that_waited_when_the_socket_was_lost_are_answered_and_kept(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        await talk.asked.wait()
        await client.ask("둘")
        await client.ask("셋")
        await client.silent()
        await client.cut()
    talk.say("첫째").end()
    await until(lambda: server.sessions and server.session().worker is None)
    async with server.connect() as client:
        texts = [text_of(await client.reply()) for _ in range(3)]
        assert texts == ["첫째", "들은 말: 둘", "들은 말: 셋"]
        await client.silent()
    assert [row[0] for row in await server.rows()] == ["하나", "둘", "셋"]


async def test_two_pages_that_lose_the_same_network_both_get_the_reply(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as one, server.connect() as two:
        await one.ask()
        await talk.asked.wait()
        await one.cut()
        await two.cut()
    await until(lambda: not server.session().sockets)
    talk.say("가").end()
    await until(lambda: server.session().worker is None)
    for _ in range(2):
        async with server.connect() as client:
            assert text_of(await client.reply()) == "가"
    async with server.connect() as client:
        await client.silent()


async def test_closing_right_after_asking_still_stores_the_turn(server: Server) -> None:
    async with server.connect() as client:
        await client.ask("하고 싶은 말")
    await until(lambda: server.session().worker is None)
    assert [row[0] for row in await server.rows()] == ["하고 싶은 말"]
    async with server.connect() as client:
        assert text_of(await client.reply()) == "들은 말: 하고 싶은 말"


async def test_a_reply_is_kept_for_so_long_and_no_longer(
    server: Server, counsellor: ScriptedCounsellor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "RESUME_SECONDS", 0.3)
    async with server.connect() as client:
        await client.ask()
        await client.cut()
    await until(lambda: not server.sessions)
    async with server.connect() as client:
        await client.silent()


async def test_seq_never_repeats_also_after_a_restart(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    seqs: list[int] = []
    for _ in range(3):
        async with serve(settings, ScriptedCounsellor()) as server, server.connect() as client:
            await client.ask()
            seqs += [frame["seq"] for frame in await client.reply()]
    assert seqs == sorted(set(seqs))


async def test_seq_does_not_fall_behind_what_another_replica_has_sent(
    counsellor: ScriptedCounsellor, tmp_path: Path
) -> None:
    clock = [1_800_000_000.0]
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    async with serve(settings, counsellor, clock=lambda: clock[0]) as server:
        async with server.connect() as client:
            await client.ask("하나")
        await until(lambda: not server.session().sockets and server.session().worker is None)
        clock[0] += 10  # meanwhile the page has talked to another replica, whose seq came from this clock
        async with server.connect() as client:
            assert (await client.reply())[0]["seq"] < 1_800_000_001 * 1e6  # the kept one, as it was
            await client.ask("둘")
            assert (await client.reply())[0]["seq"] > clock[0] * 1e6


# Several sockets


async def test_eight_sockets_all_see_the_reply(server: Server) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect()) for _ in range(8)]
        await clients[3].ask("모두에게")
        replies = [await client.reply() for client in clients]
        assert replies == [replies[0]] * 8
        assert text_of(replies[0]) == "들은 말: 모두에게"


async def test_a_socket_that_joins_during_a_reply_sees_it_from_its_begin(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    async with server.connect() as one:
        await one.ask()
        talk.say("하나")
        first = [await one.frame(), await one.frame()]
        async with server.connect() as two:
            assert [await two.frame(), await two.frame()] == first
            talk.say("둘").end()
            assert await one.reply() == await two.reply()
            await two.silent()


async def read_nothing(server: Server, session_id: str = "가") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that opens a socket and then never reads, with the smallest buffers that it can have."""
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(
        f"GET /ws/session/{session_id} HTTP/1.1\r\nHost: localhost\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n".encode()
    )
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    return reader, writer


async def read_long_reply(client: Client, counsellor: ScriptedCounsellor) -> None:
    """Ask for 18 MB, which is more than all buffers between the server and another client, and read them."""
    talk = counsellor.expect()
    await client.ask()
    for _ in range(60):
        talk.say("가" * 100_000)
        while (await client.frame())["type"] != "ai_stream_chunk":
            pass
    talk.end()
    assert kinds_of(await client.reply()) == ["complete"]


async def test_a_reader_that_never_reads_is_cut_off_and_holds_up_nobody(
    server: Server, counsellor: ScriptedCounsellor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(bemore_voice, "MAX_UNSENT_BYTES", 1 << 40)
    monkeypatch.setattr(bemore_voice, "MAX_REPLY_CHARACTERS", 1 << 40)
    _, writer = await read_nothing(server, "s")
    async with server.connect("s") as client:
        await read_long_reply(client, counsellor)
        await until(lambda: len(server.session("s").sockets) == 1)
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"
    writer.transport.abort()


async def test_a_reader_that_lets_a_megabyte_gather_is_cut_off(
    server: Server, counsellor: ScriptedCounsellor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "MAX_REPLY_CHARACTERS", 1 << 40)
    _, writer = await read_nothing(server, "s")
    async with server.connect("s") as client:
        await read_long_reply(client, counsellor)
        await until(lambda: len(server.session("s").sockets) == 1)
    writer.transport.abort()


async def test_a_half_open_connection_is_found(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "HEARTBEAT_SECONDS", 0.3)
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    async with serve(settings, counsellor) as server, Wire(lambda: asyncio.open_connection(*server.address)) as wire:
        async with server.http.ws_connect(f"http://127.0.0.1:{wire.port}/ws/session/가", timeout=IMPATIENT):
            wire.freeze()
            await until(lambda: not server.sessions)
            async with server.connect() as client:
                await client.ask()
                assert kinds_of(await client.reply())[-1] == "complete"
            wire.cut()


# Clients that misbehave


async def test_a_thousand_frames_in_a_burst_close_the_socket_and_leave_the_session_well(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    frame = json.dumps({"type": "request_ai_response", "data": {"message": "가"}})
    async with server.connect() as other, server.connect() as client:
        for _ in range(1000):
            try:
                await client.ws.send_str(frame)
            except ConnectionError:
                break
        assert await client.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION
        talk.say("첫째").end()
        assert text_of(await other.reply()) == "첫째"
        await other.silent()
        await other.ask("다음")
        assert text_of(await other.reply()) == "들은 말: 다음"


async def test_reconnecting_a_hundred_times_in_a_row_loses_nothing(
    server: Server, counsellor: ScriptedCounsellor
) -> None:
    talk, page = counsellor.expect(), Frontend()
    async with server.connect() as client:
        await client.ask()
        await talk.asked.wait()
        await client.cut()
    for number in range(100):
        if number < len(WORDS):
            await speak(talk, [WORDS[number]], server)
        async with server.connect() as client:
            if number % 3 == 0 and number < len(WORDS):
                await page.read(client, lambda: page.chunks() >= number)  # noqa: B023
            await (client.cut() if number % 2 else client.ws.close())
        await until(lambda: not server.session().sockets)
    talk.end()
    async with server.connect() as client:
        await page.read(client, page.ended)
        page.check()
    async with server.connect() as client:
        await client.silent()
    await until(lambda: not server.sessions)


async def test_two_requests_in_one_tick_on_two_sockets_are_both_answered(server: Server) -> None:
    async with server.connect() as one, server.connect() as two:
        for number in range(20):
            await asyncio.gather(one.ask(f"왼쪽 {number}"), two.ask(f"오른쪽 {number}"))
            seen = [await client.reply() + await client.reply() for client in (one, two)]
            assert seen[0] == seen[1]
            halves = sorted(text_of(half) for half in (seen[0][: len(seen[0]) // 2], seen[0][len(seen[0]) // 2 :]))
            assert "".join(sorted("".join(halves))) == "".join(
                sorted(f"들은 말: 왼쪽 {number}들은 말: 오른쪽 {number}")
            )
    rows = [row[0] for row in await server.rows()]
    assert sorted(rows) == sorted([f"{side} {number}" for side in ("왼쪽", "오른쪽") for number in range(20)])


async def test_a_socket_that_sends_more_than_its_budget_is_closed_and_holds_up_nobody(server: Server) -> None:
    async with server.connect("가") as flood, server.connect("나") as client:
        for _ in range(200):
            await flood.ws.send_str('{"type": "ping"}')
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"
        for _ in range(FRAMES_AT_ONCE):
            assert (await flood.frame())["type"] == "pong"
        assert await flood.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION


async def test_control_frames_count_too(server: Server) -> None:
    async with server.connect() as flood:
        for _ in range(100):
            await flood.ws.ping()
        assert await flood.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION


def test_a_budget_is_full_again_after_a_while() -> None:
    socket = Socket(asyncio.Transport())
    assert [socket.take_frame(WSMsgType.TEXT, 100, 1000.0) for _ in range(FRAMES_AT_ONCE + 1)] == [
        True
    ] * FRAMES_AT_ONCE + [False]
    assert not socket.take_frame(WSMsgType.TEXT, 100, 1000.0)
    assert socket.take_frame(WSMsgType.TEXT, 100, 2000.0)


async def test_an_answer_to_a_ping_of_the_servers_costs_the_peer_nothing(server: Server) -> None:
    """A ping follows each reply, to all tabs: many short replies to one tab close no other."""
    async with server.connect() as asking, server.connect() as other:
        for _ in range(FRAMES_AT_ONCE // 2):
            await send_together(asking, ("request_ai_response", {"message": "가"}), ("cancel_ai_response", None))
            for client in (asking, other):
                assert kinds_of(await client.reply()) == ["complete"]
        async with server.connect() as third:
            for _ in range(FRAMES_AT_ONCE // 2):
                await send_together(third, ("request_ai_response", {"message": "가"}), ("cancel_ai_response", None))
                for client in (third, other):
                    assert kinds_of(await client.reply()) == ["complete"]
        for _ in range(FRAMES_AT_ONCE - 10):
            await other.silent()


# The end of the process


async def test_a_reply_that_does_not_end_in_time_ends_as_by_a_cancel(
    counsellor: ScriptedCounsellor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bemore_voice, "DRAIN_SECONDS", 0.3)
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    async with serve(settings, counsellor) as server, server.connect() as client:
        talk = counsellor.expect()
        await client.ask("하나")
        talk.say("가")
        await client.frame()
        await client.frame()
        ending = asyncio.create_task(server.runner.cleanup())
        await client.ask("너무 늦은 말")
        frames = await client.reply()
        assert (kinds_of(frames), frames[-1]["interrupted"]) == (["complete"], True)
        assert (await client.frame())["code"] == "ai_unavailable"
        assert await client.closed() == aiohttp.WSCloseCode.GOING_AWAY
        await ending
        assert talk.closed.is_set()
    async with make_storage(settings) as storage:
        said = await storage.conversations("가", 10, 2**53)
        assert [(turn["user_message"], turn["ai_response"]) for turn in said] == [("하나", "가")]


async def test_both_say_goodbye_once(counsellor: ScriptedCounsellor, tmp_path: Path) -> None:
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), counsellor) as server:
        reader, writer = await read_nothing(server, "s")
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        ending = asyncio.create_task(server.runner.cleanup())
        frame = await reader.readexactly(4)
        assert frame == b"\x88\x02" + WSCloseCode.GOING_AWAY.to_bytes(2, "big")
        writer.write(b"\x88\x82" + bytes(4) + WSCloseCode.GOING_AWAY.to_bytes(2, "big"))
        assert await reader.read() == b""
        writer.transport.abort()
        await ending


async def test_a_client_that_does_not_say_goodbye_does_not_hold_the_end_up(
    counsellor: ScriptedCounsellor, tmp_path: Path
) -> None:
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), counsellor) as server:
        _, writer = await read_nothing(server, "s")
        async with asyncio.timeout(5):
            await server.runner.cleanup()
        writer.transport.abort()
