"""A reply outlives its socket: what a frontend that reconnects ends up with."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import aiohttp
import pytest
from support import CANARY, Frontend, ScriptedCounsellor, Server, Serving, Wire, kinds_of, text_of
from tools import until

from bemore.counsellor import Failed
from bemore_voice import Limits

WORDS = [f"낱말{number} " for number in range(8)]
IMPATIENT = aiohttp.ClientWSTimeout(ws_close=0.1)


async def freeze(_: Frontend, wire: Wire) -> None:
    wire.freeze()


LOSSES: dict[str, Callable[[Frontend, Wire], Awaitable[object]]] = {
    "closed": lambda page, _: page.close(),
    "cut": lambda page, _: page.cut(),
    "frozen": freeze,
}


def check_whole(page: Frontend) -> None:
    assert text_of(page.frames) == "".join(WORDS)
    assert kinds_of(page.frames) == ["begin", *["chunk"] * len(WORDS), "complete"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("back", ["before the end", "after the end"])
async def test_reply_is_whole_wherever_the_connection_is_lost(
    server: Server, counsellor: ScriptedCounsellor, loss: str, back: str
) -> None:
    """At each boundary between two chunks; a page loaded afterwards is sent nothing again."""
    for boundary in range(len(WORDS) + 1):
        async with Wire(lambda: asyncio.open_connection(*server.address)) as wire:
            url = f"http://127.0.0.1:{wire.port}/ws/session/{boundary}"
            page = await Frontend(server.http, url, timeout=IMPATIENT).open()
            talk = counsellor.expect()
            await page.ask(f"말 {boundary}")
            await talk.asked.wait()
            await talk.say(*WORDS[:boundary]).heard()
            while kinds_of(page.frames).count("chunk") < boundary:
                await page.frame()
            await LOSSES[loss](page, wire)
            if loss != "frozen":
                await server.until_left(str(boundary))
            if back == "before the end":
                await page.reconnect(server.address)
            talk.say(*WORDS[boundary:]).end()
            if back == "after the end":
                await server.until_idle(str(boundary))
                await page.reconnect(server.address)
            await page.reply()
            check_whole(page)
            await page.silent()
            if loss == "frozen":
                await until(lambda: wire.withheld)
            wire.cut()
            await page.close()
        await server.until_left(str(boundary))
        assert [row[1] for row in await server.rows(str(boundary))] == ["".join(WORDS)]


async def test_page_loaded_after_the_end_is_sent_nothing(server: Server) -> None:
    async with server.connect() as client:
        await client.ask()
        await client.reply()
    async with server.connect() as client:
        await client.silent()


async def test_error_is_kept_for_a_lost_socket(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("가")
    async with server.connect() as client:
        await client.ask()
        await client.begun()
        await client.cut()
        await server.until_left()
        talk.fail(Failed("test"))
        await server.until_idle()
        await client.open()
        await client.reply()
        assert kinds_of(client.frames) == ["begin", "chunk", "error"]
        await client.ask()
        assert kinds_of(await client.reply())[-1] == "complete"


async def test_waiting_requests_of_a_lost_socket_are_answered(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as client:
        await client.ask("하나")
        await talk.asked.wait()
        await client.ask("둘")
        await client.ask("셋")
        await client.silent()
        await client.cut()
        talk.say("첫째").end()
        await server.until_idle()
        await client.open()
        texts = [text_of(await client.reply()) for _ in range(3)]
        assert texts == ["첫째", "들은 말: 둘", "들은 말: 셋"]
        await client.silent()
    assert [row[0] for row in await server.rows()] == ["하나", "둘", "셋"]


async def test_closing_right_after_asking_stores_the_turn(server: Server) -> None:
    async with server.connect() as client:
        await client.ask("하고 싶은 말")
        await client.close()
        await server.until_left()
        await server.until_idle()
        assert [row[0] for row in await server.rows()] == ["하고 싶은 말"]
        await client.open()
        assert text_of(await client.reply()) == "들은 말: 하고 싶은 말"


async def test_reconnecting_thirty_times_loses_nothing(server: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with server.connect() as page:
        await page.ask()
        await talk.asked.wait()
        await page.cut()
        for number in range(30):
            await server.until_left()
            if number < len(WORDS):
                await talk.say(WORDS[number]).heard()
            await page.open()
            if number % 3 == 0 and number < len(WORDS):
                while kinds_of(page.frames).count("chunk") <= number:
                    await page.frame()
            await (page.cut() if number % 2 else page.close())
        talk.end()
        await page.open()
        await page.reply()
        check_whole(page)


async def test_seq_is_not_behind_another_replica(serving: Serving) -> None:
    """A page that has talked to another replica meanwhile has seen a seq from the same clock."""
    clock = [1_800_000_000.0]
    async with serving(clock=lambda: clock[0]) as server, server.connect() as client:
        await client.ask("하나")
        await client.cut()
        await server.until_left()
        await server.until_idle()
        clock[0] += 10
        await client.open()
        assert (await client.reply())[0]["seq"] < 1_800_000_001 * 1e6  # the kept reply, as it was
        await client.ask("둘")
        assert (await client.reply())[0]["seq"] >= clock[0] * 1e6


# Several sockets


async def test_eight_sockets_all_see_the_reply(server: Server) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect()) for _ in range(8)]
        await clients[3].ask()
        replies = [await client.reply() for client in clients]
        assert replies == [replies[0]] * 8
        assert text_of(replies[0]) == f"들은 말: {CANARY}"


async def test_half_open_connection_is_found(serving: Serving) -> None:
    async with (
        serving(limits=Limits(heartbeat_seconds=0.3)) as server,
        Wire(lambda: asyncio.open_connection(*server.address)) as wire,
    ):
        page = await Frontend(server.http, f"http://127.0.0.1:{wire.port}/ws/session/가", timeout=IMPATIENT).open()
        await page.send("ping")
        assert (await page.frame())["type"] == "pong"
        wire.freeze()
        await server.until_forgotten()
        assert wire.withheld
        wire.cut()
        await page.close()
