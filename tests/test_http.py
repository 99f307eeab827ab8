"""HTTP: sessions, health, the page, and what is refused before the upgrade."""

import asyncio
import base64
import hashlib
import io
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import jwt
import pytest
from support import SECRET, FaultyStorage, ScriptedCounsellor, Server, logged, make_settings, serve, token_for
from tools import PATIENCE
from yarl import URL

from bemore.api import HTTP_ERRORS
from bemore.demo import Demo
from bemore_voice import __version__, make_storage

HANDSHAKE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
HANDSHAKE["Sec-WebSocket-Key"] = "MDEyMzQ1Njc4OWFiY2RlZg=="


async def refused(server: Server, path: str, **options: Any) -> tuple[int, str]:
    """The status and code by which a handshake is refused."""
    headers = {**HANDSHAKE, **options.pop("headers", {})}
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
        rows = await server.storage.fetch("SELECT session_id FROM sessions")
        assert [row[0] for row in rows] == ["test-session-123"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Sec-WebSocket-Version", "12"),
        ("Sec-WebSocket-Version", "\udcff"),
        ("Sec-WebSocket-Version", None),
        ("Sec-WebSocket-Key", "\udcffDEyMzQ1Njc4OWFiY2RlZg=="),
        ("Sec-WebSocket-Key", "가DEyMzQ1Njc4OWFiY2RlZg=="),
        ("Sec-WebSocket-Key", "MDEy"),
        ("Sec-WebSocket-Key", ""),
        ("Sec-WebSocket-Key", None),
        ("Upgrade", None),
    ],
)
async def test_a_bad_handshake_is_told_to_upgrade(server: Server, name: str, value: str | None) -> None:
    lines = {**HANDSHAKE, "Host": "127.0.0.1", name: value}
    head = "".join(f"{key}: {line}\r\n" for key, line in lines.items() if line is not None)
    reader, writer = await raw(server, f"GET /ws/session/s HTTP/1.1\r\n{head}\r\n".encode(errors="surrogateescape"))
    assert b" 426 " in await reader.readline()
    writer.close()
    assert not any(line.startswith("ERROR") for line in logged)
    assert not list(await server.storage.fetch("SELECT * FROM sessions"))


async def test_head_of_a_socket_does_not_open_one(server: Server) -> None:
    async with server.http.head(f"{server.url}/ws/session/s", headers=HANDSHAKE) as response:
        assert response.status == 405
    assert not list(await server.storage.fetch("SELECT * FROM sessions"))


async def test_a_plain_get_of_a_socket_is_told_to_upgrade_and_creates_nothing(server: Server) -> None:
    async with server.http.get(f"{server.url}/ws/session/x") as response:
        assert response.status == 426
        assert (await response.json())["code"] == "upgrade_required"
    assert not list(await server.storage.fetch("SELECT * FROM sessions"))


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
    async with server.http.get(url, headers=HANDSHAKE) as response:
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
    storage = FaultyStorage(make_storage(settings))
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


# Limits


async def new_session(server: Server, **headers: str) -> tuple[int, str | None]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    async with server.http.post(f"{server.url}/api/sessions", headers=headers) as response:
        return response.status, response.headers.get("Retry-After")


async def test_new_sessions_are_limited_by_address_and_minute(tmp_path: Path) -> None:
    clock = [1_800_000_000.0]
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_NEW_SESSIONS_PER_MINUTE=3)
    async with serve(settings, Demo(), monotonic=lambda: clock[0]) as server:
        # Without TRUST_PROXY the header is anyone's to write.
        answers = [await new_session(server, X_Forwarded_For=f"10.0.0.{number}") for number in range(4)]
        assert answers == [(201, None)] * 3 + [(429, "20")]
        assert len(list(await server.storage.fetch("SELECT * FROM sessions"))) == 3
        clock[0] += 19.5
        assert await new_session(server) == (429, "1")
        clock[0] += 0.5
        assert await new_session(server) == (201, None)
        assert await new_session(server) == (429, "20")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1, 10.0.0.9", "10.0.0.2, 10.0.0.9", True),  # what stands before the last is the client's word
        ("203.0.113.5:1234", "203.0.113.5:4321", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("[2001:db8::1]:80", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("nonsense", "more nonsense", True),
    ],
)
async def test_behind_a_trusted_proxy_its_word_counts(tmp_path: Path, one: str, other: str, same: bool) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_NEW_SESSIONS_PER_MINUTE=1, TRUST_PROXY=1)
    async with serve(settings, Demo()) as server:
        assert (await new_session(server, X_Forwarded_For=one))[0] == 201
        assert (await new_session(server, X_Forwarded_For=one))[0] == 429
        assert (await new_session(server, X_Forwarded_For=other))[0] == (429 if same else 201)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_is_passed_over_up_to_its_limit(server: Server, chunked: bool) -> None:
    async def body(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 1024):
            yield b" " * 1024

    for size, status in ((1024, 201), (16 * 1024, 201), (17 * 1024, 413), (4 * 1024 * 1024, 413)):
        data = body(size) if chunked else io.BytesIO(b" " * size)
        async with server.http.post(f"{server.url}/api/sessions", data=data) as response:
            assert response.status == status
            if status == 413:
                assert (await response.json())["code"] == "body_too_large"


async def raw(server: Server, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(request)
    return reader, writer


async def test_a_body_that_does_not_come_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bemore.api.BODY_SECONDS", 0.2)
    head = b"POST /api/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nslow"
    reader, writer = await raw(server, head)
    async with asyncio.timeout(PATIENCE):
        answer = await reader.read()  # until the server closes
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer
    writer.close()
    assert not list(await server.storage.fetch("SELECT * FROM sessions"))


@pytest.mark.parametrize("head", [b"X: " + b"a" * 10_000, b"\r\n".join(b"X-%d: a" % number for number in range(200))])
async def test_a_header_has_limits(server: Server, head: bytes) -> None:
    reader, writer = await raw(server, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head + b"\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"type":"request_ai_response","data":{"message":'])
async def test_a_bomb_of_nested_json_is_refused(server: Server, opening: str) -> None:
    async with server.connect() as client, server.connect("another") as other:
        await client.ws.send_str((opening * 65_536)[:65_536])
        assert (await client.frame())["code"] == "invalid_request"
        await other.silent()
        await client.ask()
        assert (await client.reply())[-1]["type"] == "ai_stream_complete"


# Headers


async def test_every_answer_has_its_headers(server: Server) -> None:
    answers = [("GET", "/"), ("GET", "/health"), ("POST", "/api/sessions"), ("GET", "/nowhere"), ("PUT", "/health")]
    answers += [("OPTIONS", "/api/sessions"), ("GET", "/api/sessions/x/conversations"), ("DELETE", "/api/sessions/x")]
    for method, path in answers:
        async with server.http.request(method, server.url + path) as response:
            headers = response.headers
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Cache-Control"] == "no-store"
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert headers["Server"] == "BeMore voice"
    async with server.http.get(f"{server.url}/ws/session/가", headers=HANDSHAKE) as response:
        assert (response.status, response.headers["Server"]) == (101, "BeMore voice")


async def test_the_page_is_allowed_itself_alone(server: Server) -> None:
    async with server.http.get(f"{server.url}/") as response:
        policy = response.headers["Content-Security-Policy"]
        page = await response.text()
    assert "unsafe" not in policy
    assert "*" not in policy
    assert "frame-ancestors 'none'" in policy
    for tag in ("script", "style"):
        (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


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
    assert not list(await guarded.storage.fetch("SELECT * FROM sessions"))


@pytest.mark.parametrize("origin", [ALLOWED, "http://localhost:5173", None, "own"])
async def test_an_allowed_origin_the_servers_own_and_none_pass(guarded: Server, origin: str | None) -> None:
    headers = {} if origin is None else {"Origin": guarded.url if origin == "own" else origin}
    async with guarded.connect(headers=headers) as client:
        await client.silent()
    async with guarded.http.post(f"{guarded.url}/api/sessions", headers=headers) as response:
        assert response.status == 201
        if origin not in (None, "own"):
            assert response.headers["Access-Control-Allow-Origin"] == origin


async def test_a_strangers_name_for_this_machine_is_refused(guarded: Server) -> None:
    """DNS rebinding: the browser takes both for one origin, and sends no Origin, or the stranger's."""
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:80", "Origin": "http://evil.example:80"}):
        for path in ("/", "/health", "/api/sessions/x/conversations"):
            async with guarded.http.get(guarded.url + path, headers=headers) as response:
                assert (response.status, (await response.json())["code"]) == (403, "origin_not_allowed")
        assert await refused(guarded, "/ws/session/x", headers=headers) == (403, "origin_not_allowed")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "app.example"):
        async with guarded.http.get(f"{guarded.url}/health", headers={"Host": host}) as response:
            assert response.status == 200
    for host in ("[", "[::1", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        async with guarded.http.get(f"{guarded.url}/health", headers={"Host": host}) as response:
            assert response.status in (400, 403)


@pytest.mark.parametrize("host", ["LOCALHOST", "0:0:0:0:0:0:0:1", "127.1"])
async def test_a_loopback_address_is_guarded_however_it_is_written(tmp_path: Path, host: str) -> None:
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db", HOST=host), Demo()) as server:
        for strange in ({"Host": "evil.example"}, {"Host": "evil.example:80", "Origin": "http://evil.example:80"}):
            assert await refused(server, "/ws/session/x", headers=strange) == (403, "origin_not_allowed")
        async with server.connect() as client:
            await client.silent()


async def test_a_server_that_others_reach_goes_by_any_name(tmp_path: Path) -> None:
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db", HOST="0.0.0.0"), Demo()) as server:
        headers = {"Host": "voice.example:8000", "Origin": "http://voice.example:8000"}
        async with server.connect(headers=headers) as client:
            await client.silent()


@pytest.mark.parametrize(("trusted", "passes"), [(1, True), (0, False)])
async def test_behind_a_proxy_that_ends_tls_its_word_for_the_scheme_counts(
    tmp_path: Path, trusted: int, passes: bool
) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", TRUST_PROXY=trusted, HOST="0.0.0.0")
    headers = {"Host": "voice.example", "Origin": "https://voice.example", "X-Forwarded-Proto": "http, https"}
    async with serve(settings, Demo()) as server:
        async with server.http.post(f"{server.url}/api/sessions", headers=headers) as response:
            assert response.status == (201 if passes else 403)
        if passes:
            async with server.connect(headers=headers) as client:
                await client.silent()
            headers["Origin"] = "http://voice.example"
        assert await refused(server, "/ws/session/x", headers=headers) == (403, "origin_not_allowed")


async def test_a_preflight_is_answered(guarded: Server) -> None:
    headers = {"Origin": ALLOWED, "Access-Control-Request-Method": "POST"}
    async with guarded.http.options(f"{guarded.url}/api/sessions", headers=headers) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == ALLOWED
        assert response.headers["Access-Control-Allow-Methods"] == "GET, POST, DELETE"
        assert "Authorization" in response.headers["Access-Control-Allow-Headers"]


# Tokens


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
            token_for("s", secret=None, algorithm="none"),
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
