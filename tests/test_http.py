"""HTTP: sessions, health, the page, and what is refused before the upgrade."""

import html
import io
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import jwt
import pytest
from support import SECRET, Frontend, ScriptedCounsellor, Server, Serving, handshake, logged, token_for
from tools import until

from bemore.api import API, ModelHealth
from bemore.log import LogLimit
from bemore.refusals import HTTP_ERRORS, SECURITY_HEADERS, HttpRefusal
from bemore_voice import Limits, __version__

ALLOWED = "https://app.example"


async def refused(server: Server, path: str, *, token: str = "", **headers: str) -> tuple[int, str]:
    """Return the status and code by which a handshake is refused."""
    async with server.knock(handshake(f"{path}?token={token}" if token else path, **headers)) as peer:
        status, _, body = await peer.answer()
    answer = json.loads(body)
    assert (status, answer["error"]) == HTTP_ERRORS[answer["code"]]
    return status, answer["code"]


async def no_session_was_made(server: Server) -> bool:
    return not list(await server.storage.fetch("SELECT * FROM sessions"))


# Sessions


async def test_a_new_session_can_be_talked_to(serving: Serving, database_url: str) -> None:
    async with serving(database_url, AUTO_CREATE_SESSIONS=0) as server:
        made = []
        for _ in range(3):
            async with server.http.post(f"{server.url}/api/sessions") as response:
                assert response.status == 201
                made.append(await response.json())
        assert len({body["session_id"] for body in made}) == 3
        assert all(set(body) == {"session_id", "websocket_path"} for body in made)
        # 192 bits, at six a character.
        assert all(len(body["session_id"]) == 32 for body in made)
        assert made[0]["websocket_path"] == f"/ws/session/{made[0]['session_id']}"
        async with server.connect(made[0]["session_id"]) as client:
            await client.ask()
            assert (await client.reply())[-1]["type"] == "ai_stream_complete"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"Version: 13", b"Version: 12"),
        (b"Version: 13", b"Version: \xff"),
        (b"Key: ", b"Key: \xff"),
        (b"Key: ", b"Key: MDEy\r\nX: "),
        (b"Upgrade: websocket", b"Upgrade: h2c"),
    ],
)
async def test_a_bad_handshake_is_told_to_upgrade(server: Server, before: bytes, after: bytes) -> None:
    head = handshake("/ws/session/s")
    assert before in head
    async with server.knock(head.replace(before, after)) as peer:
        status, _, body = await peer.answer()
        assert (status, json.loads(body)["code"]) == (426, "upgrade_required")
    assert not any(line.startswith("ERROR") for line in logged)
    assert await no_session_was_made(server)


@pytest.mark.parametrize(("method", "status"), [("GET", 426), ("HEAD", 405)])
async def test_a_request_that_is_no_handshake_opens_nothing(server: Server, method: str, status: int) -> None:
    async with server.http.request(method, f"{server.url}/ws/session/s") as response:
        assert response.status == status
    assert await no_session_was_made(server)


@pytest.mark.parametrize("session_id", ["한글 세션", "a/b", "..%2F"])
async def test_a_session_id_may_hold_any_printable_text(server: Server, session_id: str) -> None:
    async with server.connect(session_id) as client:
        await client.ask()
        assert (await client.reply())[-1]["type"] == "ai_stream_complete"


@pytest.mark.parametrize("path", ["", "a" * 256, "a%0Ab"])
async def test_any_other_session_id_is_refused(server: Server, path: str) -> None:
    assert await refused(server, f"/ws/session/{path}") == (400, "invalid_session_id")


async def test_the_ninth_socket_of_a_session_is_refused(server: Server) -> None:
    clients = [await server.frontend("s").open() for _ in range(8)]
    assert await refused(server, "/ws/session/s") == (429, "too_many_sockets")
    async with server.connect("another") as other:
        await other.silent()
    await clients[0].close()
    await until(lambda: len(server.clients("s")) == 7)
    async with server.connect("s") as client:
        await client.silent()
    for client in clients:
        await client.close()


async def test_sessions_that_another_service_makes_are_not_made_here(serving: Serving, postgres_url: str) -> None:
    owner = await asyncpg.connect(postgres_url)
    await owner.execute("CREATE TABLE sessions (session_id VARCHAR(255) PRIMARY KEY, user_id INT NOT NULL)")
    await owner.close()
    async with serving(postgres_url) as server, server.http.post(f"{server.url}/api/sessions") as response:
        assert response.status == 403
        assert (await response.json())["code"] == "sessions_managed_elsewhere"


async def test_no_compression_is_agreed_to(server: Server) -> None:
    async with server.connect(compress=15) as client:
        assert client.ws.compress == 0
        await client.silent()


# Health


async def test_health_tells_which_model_answers(server: Server) -> None:
    async with server.http.get(f"{server.url}/health") as response:
        assert response.status == 200
        body = await response.json()
    assert body.pop("model")["state"] == "unknown"
    assert body == {"status": "ok", "database": "ok", "ai": "scripted", "version": __version__}


def test_the_models_state_is_that_of_the_last_reply() -> None:
    """It names the time since when that has been so."""
    now = [1_800_000_000.0]
    model = ModelHealth(lambda: now[0])
    assert model.state() == {"state": "unknown", "since": "2027-01-15T08:00:00.000Z"}
    states = []
    for ok in (True, True, False, False, True):
        now[0] += 60
        model.note(ok)
        states.append((model.state()["state"], model.state()["since"][11:16]))
    assert states == [("ok", "08:01")] * 2 + [("failing", "08:03")] * 2 + [("ok", "08:05")]


async def test_a_failing_model_changes_no_status(server: Server) -> None:
    server.runner.app[API].model_health.note(False)
    async with server.http.get(f"{server.url}/health") as response:
        assert (response.status, (await response.json())["model"]["state"]) == (200, "failing")


async def test_without_its_database_it_is_alive_but_not_healthy(server: Server) -> None:
    server.faults.fail()
    async with server.http.get(f"{server.url}/health") as response:
        assert (response.status, (await response.json())["database"]) == (503, "unavailable")
    async with server.http.get(f"{server.url}/livez") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    async with server.http.post(f"{server.url}/api/sessions") as response:
        assert (response.status, (await response.json())["code"]) == (503, "unavailable")
    assert any('method=POST route=/api/sessions cause="database: test"' in line for line in logged)
    server.faults.heal()
    async with server.http.get(f"{server.url}/health") as response:
        assert response.status == 200


# The page


async def test_the_page_says_what_this_is(server: Server) -> None:
    pages = []
    for path, kind in (("/", "text/html"), ("/demo.css", "text/css"), ("/demo.js", "text/javascript")):
        async with server.http.get(server.url + path) as response:
            assert (response.status, response.content_type) == (200, kind)
            pages.append(await response.text())
    assert all(word in "".join(pages) for word in ("AI", "tel:109", "tel:119"))


async def test_a_page_that_is_not_installed_is_not_found(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore.api.HERE", tmp_path)
    async with server.http.get(f"{server.url}/") as response:
        assert (response.status, (await response.json())["code"]) == (404, "not_found")


async def test_the_page_is_told_its_settings_as_attributes(serving: Serving, counsellor: ScriptedCounsellor) -> None:
    notice = "https://app.example/?a=1&b='x'"
    counsellor.name = 'a "model" <b>'
    async with serving(NOTICE_URL=notice, KEEP_DAYS=1.5) as server, server.http.get(f"{server.url}/") as response:
        [attributes] = re.findall("<body ([^>]*)>", await response.text())
    given = {name: html.unescape(value) for name, value in re.findall('data-([a-z-]+)="([^"]*)"', attributes)}
    assert given == {"answers": "gemini", "model": counsellor.name, "keep-days": "1.5", "notice-url": notice}


async def test_the_page_may_load_its_own_files_alone(server: Server) -> None:
    async with server.http.get(f"{server.url}/") as response:
        policy = response.headers["Content-Security-Policy"]
    rules = {name: values for name, *values in (rule.split() for rule in policy.split("; "))}
    assert rules["default-src"] == rules["frame-ancestors"] == ["'none'"]
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == ["'self'"]


# Limits


async def new_session(server: Server, **headers: str) -> tuple[int, str | None]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    async with server.http.post(f"{server.url}/api/sessions", headers=headers) as response:
        return response.status, response.headers.get("Retry-After")


async def test_new_sessions_are_limited_by_address_and_minute(serving: Serving) -> None:
    clock = [1_800_000_000.0]
    async with serving(monotonic=lambda: clock[0], MAX_NEW_SESSIONS_PER_MINUTE=3) as server:
        # Without TRUST_PROXY the client may have written the header itself.
        answers = [await new_session(server, X_Forwarded_For=f"10.0.0.{number}") for number in range(4)]
        assert answers == [(201, None)] * 3 + [(429, "20")]
        assert len(list(await server.storage.fetch("SELECT * FROM sessions"))) == 3
        clock[0] += 19.5
        assert await new_session(server) == (429, "1")
        clock[0] += 0.5
        assert await new_session(server) == (201, None)


async def test_behind_a_trusted_proxy_its_last_address_counts(serving: Serving) -> None:
    async with serving(MAX_NEW_SESSIONS_PER_MINUTE=1, TRUST_PROXY=1) as server:
        for forwarded, status in (("10.0.0.1, 10.0.0.9", 201), ("10.0.0.2, 10.0.0.9", 429), ("10.0.0.2", 201)):
            assert (await new_session(server, X_Forwarded_For=forwarded))[0] == status


@pytest.fixture
async def hurried(serving: Serving) -> AsyncIterator[Server]:
    """A server that does not wait long for the rest of a refused body."""
    async with serving(limits=Limits(close_seconds=0.2)) as running:
        yield running


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_more_than_16_kib_is_refused(hurried: Server, chunked: bool) -> None:
    async def pieces(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 1024):
            yield b" " * 1024

    for size, status in ((1024, 201), (16 * 1024, 201), (17 * 1024, 413), (4 * 1024 * 1024, 413)):
        data = pieces(size) if chunked else io.BytesIO(b" " * size)
        async with hurried.http.post(f"{hurried.url}/api/sessions", data=data) as response:
            assert response.status == status
            if status == 413:
                assert (await response.json())["code"] == "body_too_large"


async def test_a_body_in_any_encoding_is_passed_over(server: Server) -> None:
    head = b"POST /api/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nhush"
    async with server.knock(head) as peer:
        assert (await peer.answer())[0] == 201


async def test_a_body_that_does_not_come_is_refused(hurried: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bemore.refusals.BODY_SECONDS", 0.2)
    head = b"POST /api/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nslow"
    async with hurried.knock(head) as peer:
        status, _, body = await peer.answer()
        assert (status, json.loads(body)["code"]) == (408, "request_timeout")
        await peer.end()
    assert await no_session_was_made(hurried)


# Headers


async def test_every_answer_has_the_security_headers(server: Server) -> None:
    requests = [("GET", "/health"), ("POST", "/api/sessions"), ("GET", "/nowhere"), ("PUT", "/health")]
    requests += [("GET", "/api/sessions/x/conversations"), ("DELETE", "/api/sessions/x"), ("GET", "/ws/session/x")]
    for method, path in requests:
        async with server.http.request(method, server.url + path) as response:
            assert SECURITY_HEADERS.items() <= dict(response.headers).items()
    async with server.http.get(f"{server.url}/") as response:
        own = {**SECURITY_HEADERS, "Content-Security-Policy": response.headers["Content-Security-Policy"]}
        assert own.items() <= dict(response.headers).items()
    async with server.knock(handshake("/ws/session/가")) as peer:
        status, headers, _ = await peer.answer()
        assert (status, headers["server"]) == (101, "BeMore voice")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/health", 405)])
async def test_what_is_not_there_is_said_in_korean(server: Server, method: str, path: str, status: int) -> None:
    async with server.http.request(method, server.url + path) as response:
        body = await response.json()
        assert (response.status, body["error"]) == HTTP_ERRORS[body["code"]]
        assert response.status == status
        assert response.headers.get("Allow") == ("GET,HEAD" if status == 405 else None)


def test_http_refusals_do_not_read_as_an_expired_session() -> None:
    for status, sentence in HTTP_ERRORS.values():
        assert 400 <= status < 600
        assert not any(word in sentence.lower() for word in ("foreign key", "conversations", "session_id"))


def test_a_wait_is_rounded_up_to_whole_seconds() -> None:
    assert HttpRefusal("too_many_sessions", retry_after=0.2).headers == {"Retry-After": "1"}
    assert HttpRefusal("too_many_sessions", retry_after=2.0).headers == {"Retry-After": "2"}


# Origins


@pytest.fixture
async def guarded(serving: Serving) -> AsyncIterator[Server]:
    async with serving(ALLOWED_ORIGINS=f"http://localhost:5173, {ALLOWED}") as server:
        yield server


@pytest.mark.parametrize("origin", ["https://evil.example", "null", ""])
async def test_another_origin_is_refused_everywhere(guarded: Server, origin: str) -> None:
    assert await refused(guarded, "/ws/session/x", Origin=origin) == (403, "origin_not_allowed")
    for method, path in (("POST", "/api/sessions"), ("OPTIONS", "/api/sessions"), ("GET", "/"), ("GET", "/health")):
        async with guarded.http.request(method, guarded.url + path, headers={"Origin": origin}) as response:
            assert (response.status, (await response.json())["code"]) == (403, "origin_not_allowed")
            assert "Access-Control-Allow-Origin" not in response.headers
    assert await no_session_was_made(guarded)


@pytest.mark.parametrize("origin", [ALLOWED, "http://localhost:5173", None, "own"])
async def test_an_allowed_origin_the_servers_own_and_none_pass(guarded: Server, origin: str | None) -> None:
    sent = guarded.url if origin == "own" else origin
    headers = {} if sent is None else {"Origin": sent}
    async with guarded.connect(headers=headers) as client:
        await client.silent()
    async with guarded.http.post(f"{guarded.url}/api/sessions", headers=headers) as response:
        assert response.status == 201
        assert response.headers.get("Access-Control-Allow-Origin") == (None if origin == "own" else origin)
        assert "Origin" in response.headers["Vary"]


async def test_a_strangers_name_for_this_machine_is_refused(guarded: Server) -> None:
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:80", "Origin": "http://evil.example:80"}):
        for path in ("/", "/health", "/api/sessions/x/conversations"):
            async with guarded.http.get(guarded.url + path, headers=headers) as response:
                assert (response.status, (await response.json())["code"]) == (403, "origin_not_allowed")
        assert await refused(guarded, "/ws/session/x", **headers) == (403, "origin_not_allowed")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "app.example"):
        async with guarded.http.get(f"{guarded.url}/health", headers={"Host": host}) as response:
            assert response.status == 200


async def test_a_server_that_others_reach_goes_by_any_name(serving: Serving) -> None:
    headers = {"Host": "voice.example:8000", "Origin": "http://voice.example:8000"}
    async with serving(HOST="0.0.0.0") as server, server.connect(headers=headers) as client:
        await client.silent()


@pytest.mark.parametrize("scheme", ["https", "wss"])
@pytest.mark.parametrize("trusted", [True, False])
async def test_the_scheme_that_a_proxy_names_counts_if_it_is_trusted(
    serving: Serving, trusted: bool, scheme: str
) -> None:
    headers = {"Host": "voice.example", "Origin": "https://voice.example", "X-Forwarded-Proto": f"http, {scheme}"}
    async with serving(TRUST_PROXY=int(trusted), HOST="0.0.0.0") as server:
        async with server.http.post(f"{server.url}/api/sessions", headers=headers) as response:
            assert response.status == (201 if trusted else 403)
        if trusted:
            async with server.connect(headers=headers) as client:
                await client.silent()
            headers["Origin"] = "http://voice.example"
        assert await refused(server, "/ws/session/x", **headers) == (403, "origin_not_allowed")


FRONTEND_HEADERS = "authorization,content-type,x-client-version,x-csrf-token,x-device-id,x-request-id,x-timestamp"


@pytest.mark.parametrize("path", ["/api/sessions", "/api/sessions/x/conversations", "/health"])
async def test_a_preflight_of_an_allowed_origin_allows_any_header(guarded: Server, path: str) -> None:
    headers = {"Origin": ALLOWED, "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = FRONTEND_HEADERS
    async with guarded.http.options(guarded.url + path, headers=headers) as response:
        assert response.status == 204
        allowed = {name: response.headers[f"Access-Control-Allow-{name}"] for name in ("Origin", "Methods", "Headers")}
        assert allowed == {"Origin": ALLOWED, "Methods": "GET, POST, DELETE", "Headers": FRONTEND_HEADERS}
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert set(response.headers.getall("Vary")) == {"Origin", "Access-Control-Request-Headers"}


async def test_a_preflight_that_is_not_ascii_allows_no_header(guarded: Server) -> None:
    head = b"OPTIONS /api/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: https://app.example\r\n"
    head += b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: \xff\r\n\r\n"
    async with guarded.knock(head) as peer:
        status, headers, _ = await peer.answer()
        assert (status, headers.get("access-control-allow-headers")) == (204, None)


async def test_options_that_ask_for_nothing_are_no_preflight(guarded: Server) -> None:
    async with guarded.http.options(f"{guarded.url}/api/sessions") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


# Refusals in the log


def refusals() -> list[str]:
    return [line for line in logged if "refused=" in line]


def test_a_kind_of_line_is_due_once_a_minute() -> None:
    now = [0.0]
    limit = LogLimit(lambda: now[0])
    due = []
    for now[0], kind in ((0, "a"), (1, "a"), (1, "b"), (59.9, "a"), (60, "a"), (60, "b"), (61, "b")):
        due.append(limit.is_due(kind))
    assert due == [True, False, True, False, True, False, True]


async def test_a_refused_origin_is_logged_with_its_setting(serving: Serving) -> None:
    """The setting is the one that would admit it."""
    clock = [0.0]
    behind_tls = {"Host": "voice.example", "Origin": "https://voice.example", "X-Forwarded-Proto": "wss"}
    async with serving(HOST="0.0.0.0", monotonic=lambda: clock[0]) as server:
        await refused(server, "/ws/session/hush", Origin="http://localhost:3000")
        clock[0] += 60
        await refused(server, "/ws/session/hush", **behind_tls)
    assert refusals() == [
        "WARNING refused=origin_not_allowed origin=http://localhost:3000 setting=ALLOWED_ORIGINS",
        "WARNING refused=origin_not_allowed origin=https://voice.example setting=TRUST_PROXY",
    ]


async def test_a_logged_refusal_holds_no_token_and_no_id(serving: Serving) -> None:
    async with serving(JWT_SECRET_KEY=SECRET, MAX_CONNECTIONS=2, MAX_NEW_SESSIONS_PER_MINUTE=1) as server:
        assert await refused(server, "/ws/session/hush?token=hush") == (401, "invalid_token")
        assert [(await new_session(server))[0] for _ in range(2)] == [201, 429]
        # The connection of those requests is kept alive, so that the second one here is over the limit.
        async with server.knock(), server.knock(handshake("/ws/session/hush?token=hush")) as peer:
            assert (await peer.answer())[0] == 503
    assert refusals() == [
        "WARNING refused=invalid_token setting=JWT_SECRET_KEY",
        "WARNING refused=too_many_sessions setting=MAX_NEW_SESSIONS_PER_MINUTE",
        "WARNING refused=too_many_connections setting=MAX_CONNECTIONS",
    ]
    assert not any("hush" in line for line in logged)


# Tokens on the socket


@pytest.mark.parametrize("required", [0, 1])
async def test_a_token_opens_its_session_only(serving: Serving, required: int) -> None:
    async with serving(JWT_SECRET_KEY=SECRET, REQUIRE_SESSION_TOKEN=required) as server:
        async with server.http.post(f"{server.url}/api/sessions") as response:
            made = await response.json()
        claims = jwt.decode(made["token"], SECRET, algorithms=["HS256"])
        assert claims["sub"] == made["session_id"]
        assert 23 * 3600 < claims["exp"] - time.time() <= 24 * 3600
        bearer = {"Authorization": f"Bearer {made['token']}"}
        for options in ({"params": {"token": made["token"]}}, {"headers": bearer}):
            async with server.connect(made["session_id"], **options) as client:
                await client.silent()
        for bad in (made["token"], token_for("s", exp=1)):
            assert await refused(server, "/ws/session/s", token=bad) == (401, "invalid_token")
            assert await refused(server, "/ws/session/s", Authorization=f"Bearer {bad}") == (401, "invalid_token")
        if required:
            assert await refused(server, "/ws/session/s") == (401, "invalid_token")
        else:
            async with server.connect("s") as client:
                await client.silent()


async def test_after_a_rotation_the_new_secret_signs_and_both_verify(serving: Serving) -> None:
    async with serving(JWT_SECRET_KEY=f"{'n' * 32},{SECRET}") as server:
        async with server.http.post(f"{server.url}/api/sessions") as response:
            made = await response.json()
        assert jwt.decode(made["token"], "n" * 32, algorithms=["HS256"])["sub"] == made["session_id"]
        for token in (token_for("s"), token_for("s", secret="n" * 32)):
            async with server.connect("s", params={"token": token}) as client:
                await client.silent()
        foreign = token_for("s", secret="f" * 32)
        assert await refused(server, "/ws/session/s", token=foreign) == (401, "invalid_token")


async def pong(client: Frontend) -> dict[str, Any]:
    await client.send("ping")
    return await client.frame()


async def test_a_pong_carries_a_fresh_token_after_half_of_its_life(serving: Serving) -> None:
    clock = [time.time()]
    token = token_for("s", exp=int(clock[0]) + 3600)
    async with serving(clock=lambda: clock[0], JWT_SECRET_KEY=SECRET, SESSION_TTL_HOURS=1) as server:
        async with server.connect("s", params={"token": token}) as client, server.connect("s") as without:
            assert "token" not in await pong(client)
            clock[0] += 2000
            frame = await pong(client)
            assert jwt.decode(frame["token"], SECRET, algorithms=["HS256"])["sub"] == "s"
            assert set(frame["data"]) == {"timestamp"}
            # The socket remembers the token that it was given.
            assert "token" not in await pong(client)
            assert "token" not in await pong(without)
        clock[0] += 2000
        assert await refused(server, "/ws/session/s", token=token) == (401, "invalid_token")
        async with server.connect("s", params={"token": frame["token"]}) as client:
            await client.silent()
