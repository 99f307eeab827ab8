"""HTTP: sessions, health, the page, and what is refused before the upgrade."""

import asyncio
import time
from pathlib import Path
from typing import Any

import asyncpg
import jwt
import pytest
from support import FaultyStorage, ScriptedCounsellor, Server, make_settings, open_storage, serve
from yarl import URL

from bemore_voice import HTTP_ERRORS, Demo, __version__

SECRET = "0123456789abcdef0123456789abcdef"


async def refused(server: Server, path: str, **options: Any) -> tuple[int, str]:
    """The status and code by which a handshake is refused."""
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers |= {"Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==", **options.pop("headers", {})}
    async with server.http.get(server.url + path, headers=headers, **options) as response:
        body = await response.json()
        assert body["error"] == HTTP_ERRORS[body["code"]][1]
        assert response.status == HTTP_ERRORS[body["code"]][0]
        return response.status, body["code"]


# Sessions


async def test_a_new_session_can_be_talked_to(database_url: str) -> None:
    async with serve(make_settings(database_url, AUTO_CREATE_SESSIONS=0), ScriptedCounsellor()) as server:
        made = []
        for _ in range(3):
            async with server.http.post(f"{server.url}/api/sessions") as response:
                assert response.status == 201
                made.append(await response.json())
        assert len({body["session_id"] for body in made}) == 3
        assert all(set(body) == {"session_id", "websocket_path"} for body in made)
        assert all(len(body["session_id"]) >= 22 for body in made)  # 128 bits and more, at six a character
        async with server.http.ws_connect(server.url + made[0]["websocket_path"]) as ws:
            await ws.send_json({"type": "request_ai_response", "data": {"message": "가"}})
            assert (await ws.receive_json(timeout=10))["type"] == "ai_stream_begin"


async def test_connecting_creates_a_session_before_the_handshake_is_answered(server: Server) -> None:
    async with server.connect("test-session-123"):
        rows = await server.storage._fetch("SELECT session_id FROM sessions")
        assert [row[0] for row in rows] == ["test-session-123"]


async def test_a_plain_get_of_a_socket_is_told_to_upgrade_and_creates_nothing(server: Server) -> None:
    async with server.http.get(f"{server.url}/ws/session/x") as response:
        assert response.status == 426
        assert (await response.json())["code"] == "upgrade_required"
    assert not list(await server.storage._fetch("SELECT * FROM sessions"))


@pytest.mark.parametrize(
    "session_id", ["a", "test-session-123", "한글 세션", "a" * 255, "가" * 255, "a/b", "..%2F", "'--"]
)
async def test_any_printable_session_id_is_taken(server: Server, session_id: str) -> None:
    async with server.connect(session_id) as client:
        await client.ask()
        assert (await client.reply())[-1]["type"] == "ai_stream_complete"


@pytest.mark.parametrize("path", ["", "a" * 256, "%EA%B0%80" * 256, "%00", "a%0Ab", "a%7Fb", "%E2%80%AE", "%C2%A0"])
async def test_any_other_session_id_is_refused(server: Server, path: str) -> None:
    url = URL(f"{server.url}/ws/session/{path}", encoded=True)
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers["Sec-WebSocket-Key"] = "MDEyMzQ1Njc4OWFiY2RlZg=="
    async with server.http.get(url, headers=headers) as response:
        assert (response.status, (await response.json())["code"]) == (400, "invalid_session_id")


async def test_the_ninth_socket_of_a_session_is_refused(server: Server) -> None:
    sockets = [await server.http.ws_connect(f"{server.url}/ws/session/s") for _ in range(8)]
    assert await refused(server, "/ws/session/s") == (429, "too_many_sockets")
    async with server.connect("another") as client:
        await client.silent()
    await sockets[0].close()
    async with server.connect("s") as client:
        await client.silent()
    await asyncio.gather(*(socket.close() for socket in sockets))


async def test_sessions_that_another_service_makes_are_not_made_here(postgres_url: str) -> None:
    owner = await asyncpg.connect(postgres_url)
    await owner.execute("CREATE TABLE sessions (session_id VARCHAR(255) PRIMARY KEY, user_id INT NOT NULL)")
    await owner.close()
    async with (
        serve(make_settings(postgres_url), Demo()) as server,
        server.http.post(f"{server.url}/api/sessions") as response,
    ):
        assert response.status == 403
        assert (await response.json())["code"] == "sessions_managed_elsewhere"


# Health and the rest


async def test_health_tells_who_answers(server: Server) -> None:
    async with server.http.get(f"{server.url}/health") as response:
        assert response.status == 200
        assert await response.json() == {"status": "ok", "database": "ok", "ai": "scripted", "version": __version__}


async def test_without_its_database_the_server_is_not_well_until_it_is_back(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    storage = FaultyStorage(open_storage(settings))
    async with serve(settings, Demo(), storage) as server:
        storage.fail()
        async with server.http.get(f"{server.url}/health") as response:
            assert response.status == 503
            assert (await response.json())["database"] == "unavailable"
        async with server.http.post(f"{server.url}/api/sessions") as response:
            assert (response.status, (await response.json())["code"]) == (503, "unavailable")
        async with server.connect() as client:
            await client.ask()
            assert (await client.frame())["code"] == "ai_unavailable"
            storage.heal()
            await client.ask()
            assert (await client.reply())[-1]["type"] == "ai_stream_complete"
        async with server.http.get(f"{server.url}/health") as response:
            assert response.status == 200


async def test_the_page_says_what_this_is(server: Server) -> None:
    async with server.http.get(f"{server.url}/") as response:
        page = await response.text()
    assert response.status == 200
    assert response.content_type == "text/html"
    assert all(word in page for word in ("인공지능", "tel:109", "tel:119", "/health"))


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/health", 405)])
async def test_what_is_not_there_is_said_in_korean(server: Server, method: str, path: str, status: int) -> None:
    async with server.http.request(method, server.url + path) as response:
        assert response.status == status
        assert "Allow" in response.headers or status == 404
        assert (await response.json())["error"] == HTTP_ERRORS[(await response.json())["code"]][1]


async def test_no_compression_is_agreed_to(server: Server) -> None:
    async with server.connect(compress=15) as client:
        assert client.ws.compress == 0
        await client.silent()


# Origins


ALLOWED = "https://app.example"


@pytest.fixture
async def guarded(tmp_path: Path) -> Any:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", ALLOWED_ORIGINS=f"http://localhost:5173, {ALLOWED}")
    async with serve(settings, Demo()) as server:
        yield server


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "https://app.example.evil.example",
        "https://app.example:8443",
        "http://app.example",
        "HTTPS://APP.EXAMPLE",
        "http://localhost:5174",
        "",
    ],
)
async def test_another_origin_is_refused_before_the_upgrade_and_on_the_api(guarded: Server, origin: str) -> None:
    assert await refused(guarded, "/ws/session/x", headers={"Origin": origin}) == (403, "origin_not_allowed")
    async with guarded.http.post(f"{guarded.url}/api/sessions", headers={"Origin": origin}) as response:
        assert response.status == 403
        assert "Access-Control-Allow-Origin" not in response.headers
    assert not list(await guarded.storage._fetch("SELECT * FROM sessions"))


@pytest.mark.parametrize("origin", [ALLOWED, "http://localhost:5173", None, "own"])
async def test_an_allowed_origin_the_servers_own_and_none_pass(guarded: Server, origin: str | None) -> None:
    headers = {} if origin is None else {"Origin": guarded.url if origin == "own" else origin}
    async with guarded.connect(headers=headers) as client:
        await client.silent()
    async with guarded.http.post(f"{guarded.url}/api/sessions", headers=headers) as response:
        assert response.status == 201
        if origin not in (None, "own"):
            assert response.headers["Access-Control-Allow-Origin"] == origin


async def test_a_preflight_is_answered(guarded: Server) -> None:
    headers = {"Origin": ALLOWED, "Access-Control-Request-Method": "POST"}
    async with guarded.http.options(f"{guarded.url}/api/sessions", headers=headers) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == ALLOWED
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        assert "Authorization" in response.headers["Access-Control-Allow-Headers"]


# Tokens


def token_for(session_id: str, secret: str = SECRET, algorithm: str = "HS256", **claims: object) -> str:
    return jwt.encode({"sub": session_id, "exp": int(time.time()) + 60, **claims}, secret, algorithm=algorithm)


@pytest.mark.parametrize("required", [0, 1])
async def test_a_token_opens_its_session_only(tmp_path: Path, required: int) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", JWT_SECRET_KEY=SECRET, REQUIRE_SESSION_TOKEN=required)
    async with serve(settings, Demo()) as server:
        async with server.http.post(f"{server.url}/api/sessions") as response:
            made = await response.json()
        claims = jwt.decode(made["token"], SECRET, algorithms=["HS256"])
        assert claims["sub"] == made["session_id"]
        assert 23 * 3600 < claims["exp"] - time.time() <= 24 * 3600
        async with server.http.ws_connect(f"{server.url}{made['websocket_path']}?token={made['token']}"):
            pass
        bearer = {"Authorization": f"Bearer {made['token']}"}
        async with server.http.ws_connect(server.url + made["websocket_path"], headers=bearer):
            pass
        bad = [
            "x",
            made["token"] + "x",
            token_for("another"),
            token_for("s", secret="f" * 32),
            token_for("s", exp=1),
            token_for("s", exp=None),
            jwt.encode({"sub": "s"}, SECRET, algorithm="HS256"),
            jwt.encode({"exp": int(time.time()) + 60}, SECRET, algorithm="HS256"),
            jwt.encode({"sub": "s", "exp": int(time.time()) + 60}, None, algorithm="none"),
        ]
        for token in bad:
            assert await refused(server, "/ws/session/s", params={"token": token}) == (401, "invalid_token")
            headers = {"Authorization": f"Bearer {token}"}
            assert await refused(server, "/ws/session/s", headers=headers) == (401, "invalid_token")
        if required:
            assert await refused(server, "/ws/session/s") == (401, "invalid_token")
        else:
            async with server.connect("s") as client:
                await client.silent()


async def test_http_refusals_do_not_read_as_an_expired_session() -> None:
    for status, sentence in HTTP_ERRORS.values():
        assert 400 <= status < 600
        assert not any(word in sentence.lower() for word in ("foreign key", "conversations", "session_id"))
