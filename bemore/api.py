"""The HTTP routes: sessions, conversations, health, the page; the table of HTTP errors, the headers of answers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from aiohttp import web

from bemore import access
from bemore.connections import SURPLUS
from bemore.counsellor import Counsellor
from bemore.log import describe_bug
from bemore.settings import Settings
from bemore.storage import NotPermitted, Storage, StorageError, Unavailable, UnknownSession

logger = logging.getLogger("bemore_voice")

PAGE = Path(__file__).parent.parent / "demo.html"

# The database column's width.
MAX_SESSION_ID_CHARACTERS = 255
# No route needs a body, but some clients send an empty object.
MAX_BODY_BYTES = 16 * 1024
BODY_SECONDS = 10
# After this time a client that found the server full may try again.
FULL_RETRY_SECONDS = 10
DEFAULT_PAGE_TURNS = 50
MAX_PAGE_TURNS = 200
# Two hundred ordinary turns are half of it.
MAX_PAGE_BYTES = 512 * 1024
# Pages that are read from the database at the same time: their rows may be much larger than the answer.
PAGES_AT_ONCE = 4
MAX_ID = 2**63 - 1
# The routes that a load balancer asks, also on a full server.
PROBES = ("/health",)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))

HTTP_ERRORS = {
    "invalid_request": (400, "요청 형식이 올바르지 않습니다"),
    "invalid_session_id": (400, "세션 ID가 올바르지 않습니다"),
    "invalid_token": (401, "인증 정보가 올바르지 않습니다"),
    "origin_not_allowed": (403, "허용되지 않은 출처의 요청입니다"),
    "sessions_managed_elsewhere": (403, "이 서버에서는 세션을 만들거나 지울 수 없습니다"),
    "not_found": (404, "찾을 수 없는 주소입니다"),
    "unknown_session": (404, "세션을 찾을 수 없습니다"),
    "method_not_allowed": (405, "지원하지 않는 요청 방식입니다"),
    "request_timeout": (408, "요청을 받는 시간이 초과되었습니다"),
    "body_too_large": (413, "요청이 너무 큽니다"),
    "upgrade_required": (426, "웹소켓으로 연결해주세요"),
    "too_many_sessions": (429, "새 세션을 너무 자주 만들었습니다. 잠시 후 다시 시도해주세요"),
    "too_many_sockets": (429, "이 세션에 열린 연결이 너무 많습니다"),
    "internal_error": (500, "서버에 문제가 생겼습니다"),
    "too_many_connections": (503, "접속자가 많습니다. 잠시 후 다시 시도해주세요"),
    "unavailable": (503, "서비스를 일시적으로 사용할 수 없습니다"),
}

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    # aiohttp would name its own version and Python's.
    "Server": "BeMore voice",
}


class HttpRefusal(Exception):
    """One of HTTP_ERRORS, as the answer to a request; `retry_after` in seconds."""

    def __init__(self, code: str, retry_after: float | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}


class ModelHealth:
    """Whether the model answers, by the last replies."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._state = "unknown"
        self._since = clock()

    def note(self, ok: bool) -> None:
        """Take in the outcome of a reply: `ok` where the model answered."""
        if (state := "ok" if ok else "failing") != self._state:
            self._state, self._since = state, self._clock()

    def state(self) -> dict[str, str]:
        """Return the state and the moment from which it holds, in UTC."""
        since = datetime.fromtimestamp(self._since, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"state": self._state, "since": since}


@dataclass(frozen=True)
class Api:
    """What the HTTP routes need from the server."""

    settings: Settings
    storage: Storage
    counsellor: Counsellor
    # Erases a session with all it said and closes its sockets; raises StorageError.
    erase: Callable[[str], Awaitable[None]]
    # Returns 0 where an address may make a session now, else the seconds until it may.
    admit_address: Callable[[str], float]
    model_health: ModelHealth
    # Seconds since the epoch.
    clock: Callable[[], float]
    # Seconds of a clock that never steps back.
    monotonic: Callable[[], float]
    version: str


API = web.AppKey("api", Api)
LOOPBACK_ONLY = web.AppKey("loopback_only", bool)
PAGES = web.AppKey("pages", asyncio.Semaphore)


def add_routes(app: web.Application) -> None:
    """Add the HTTP routes, the answers to refused requests and the headers of every answer; app[API] is set before."""
    app[LOOPBACK_ONLY] = access.is_loopback(app[API].settings.host)
    app[PAGES] = asyncio.Semaphore(PAGES_AT_ONCE)
    app.middlewares.extend([close_surplus, answer_refusals])
    app.on_response_prepare.append(add_headers)
    app.router.add_post("/api/sessions", make_session)
    app.router.add_get("/api/sessions/{session_id:[^/]*}/conversations", read_conversations, allow_head=False)
    app.router.add_delete("/api/sessions/{session_id:[^/]*}", erase_session)
    app.router.add_route("OPTIONS", "/api/{path:.*}", preflight)
    app.router.add_get("/health", health)
    app.router.add_get("/", index)


# Refusals


@web.middleware
async def close_surplus(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Close a connection over the limit once its request is answered."""
    response = await handler(request)
    if request.get(SURPLUS):
        response.force_close()
    return response


@web.middleware
async def answer_refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check what every request has to meet, and turn each exception into one of HTTP_ERRORS."""
    headers: Mapping[str, str] = {}
    try:
        check_room(request)
        check_origin(request)
        await pass_over_body(request)
        return await handler(request)
    except HttpRefusal as refusal:
        code, headers = refusal.code, refusal.headers
    except UnknownSession:
        code = "unknown_session"
    except NotPermitted:
        code = "sessions_managed_elsewhere"
    except Unavailable as error:
        code = "unavailable"
        logger.warning("%s %s: %s", request.method, request.match_info.route.resource, error.cause)
    except web.HTTPNotFound:
        code = "not_found"
    except web.HTTPMethodNotAllowed as error:
        code, headers = "method_not_allowed", {"Allow": error.headers["Allow"]}
    except ConnectionError:
        # The client has left.
        raise
    except Exception as bug:
        code = "internal_error"
        logger.error("%s %s: %s", request.method, request.match_info.route.resource, describe_bug(bug))
        if request.writer.output_size:
            # The answer has begun, or the connection is a WebSocket by now: it can only be cut.
            raise ConnectionResetError from None
    return refusal_answer(code, headers)


def refusal_answer(code: str, headers: Mapping[str, str]) -> web.Response:
    status, sentence = HTTP_ERRORS[code]
    return web.json_response({"error": sentence, "code": code}, status=status, headers=headers)


def check_room(request: web.Request) -> None:
    """Refuse a request on a connection over the limit; a load balancer may still ask for the server's health."""
    if request.get(SURPLUS) and request.path not in PROBES:
        raise HttpRefusal("too_many_connections", retry_after=FULL_RETRY_SECONDS)


def check_origin(request: web.Request) -> None:
    """Refuse a request of a page whose origin may not talk to this server."""
    settings = request.app[API].settings
    scheme = forwarded(request, "X-Forwarded-Proto") or request.scheme
    origin, own = request.headers.get("Origin"), f"{scheme}://{request.host}"
    guard_name = request.app[LOOPBACK_ONLY] and not settings.trust_proxy
    if not access.is_welcome(origin, own, settings.allowed_origins, guard_name=guard_name, name=settings.host):
        raise HttpRefusal("origin_not_allowed")


def forwarded(request: web.Request, name: str) -> str:
    """Return the nearest proxy's value of a header, where proxies are trusted."""
    if not request.app[API].settings.trust_proxy:
        return ""
    return access.last_forwarded(request.headers.getall(name, []))


async def pass_over_body(request: web.Request) -> None:
    """Read the body, which no route uses, so that the connection can be kept; refuse one that is long or slow."""
    if not request.body_exists:
        return
    try:
        async with asyncio.timeout(BODY_SECONDS):
            await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise HttpRefusal("body_too_large") from None
    except TimeoutError:
        raise HttpRefusal("request_timeout") from None
    except (web.RequestPayloadError, aiohttp.http_exceptions.HttpProcessingError):
        raise HttpRefusal("invalid_request") from None


def check_access(request: web.Request, *, token_required: bool = True) -> str:
    """Return the id of the session that a request is about; refuse a bad id and, with tokens in use, a bad token."""
    session_id, secret = request.match_info["session_id"], request.app[API].settings.jwt_secret_key
    if not (1 <= len(session_id) <= MAX_SESSION_ID_CHARACTERS and session_id.isprintable()):
        raise HttpRefusal("invalid_session_id")
    token = access.token_in(request.headers.get("Authorization", ""), request.query.get("token", ""))
    if secret and (token or token_required) and not access.is_token_for(session_id, token, secret):
        raise HttpRefusal("invalid_token")
    return session_id


# Headers


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the security headers and, for a page of an allowed origin, those of CORS."""
    headers = response.headers
    headers["Vary"] = "Origin"
    if (origin := request.headers.get("Origin")) in request.app[API].settings.allowed_origins:
        headers["Access-Control-Allow-Origin"] = str(origin)
    # The page has a policy of its own.
    policy = headers.get("Content-Security-Policy", SECURITY_HEADERS["Content-Security-Policy"])
    headers.update({**SECURITY_HEADERS, "Content-Security-Policy": policy})


async def preflight(_: web.Request) -> web.Response:
    """OPTIONS /api/...: tell a browser which requests of another origin are allowed."""
    allowed = {"Methods": "GET, POST, DELETE", "Headers": "Authorization, Content-Type"}
    headers = {f"Access-Control-Allow-{name}": value for name, value in allowed.items()}
    return web.Response(status=204, headers={**headers, "Access-Control-Max-Age": "600"})


# Sessions and conversations


async def make_session(request: web.Request) -> web.Response:
    """POST /api/sessions: make a session and return where to talk to it."""
    api = request.app[API]
    address = access.rate_limit_key(request.remote or "", forwarded(request, "X-Forwarded-For"))
    if wait := api.admit_address(address):
        raise HttpRefusal("too_many_sessions", retry_after=wait)
    session_id = secrets.token_urlsafe(24)
    await api.storage.create_session(session_id)
    body = {"session_id": session_id, "websocket_path": f"/ws/session/{session_id}"}
    if api.settings.jwt_secret_key:
        expires = int(api.clock() + api.settings.session_ttl_hours * 3600)
        body["token"] = access.issue_token(api.settings.jwt_secret_key, session_id, expires)
    return web.json_response(body, status=201)


async def read_conversations(request: web.Request) -> web.Response:
    """GET /api/sessions/{session_id}/conversations: a page of turns, the newest by default."""
    session_id = check_access(request)
    limit = read_number(request, "limit", DEFAULT_PAGE_TURNS, MAX_PAGE_TURNS)
    before = read_number(request, "before", MAX_ID, MAX_ID)
    async with request.app[PAGES]:
        turns = await request.app[API].storage.conversations(session_id, limit, before)
        body = {"session_id": session_id, "conversations": newest_that_fit(turns)}
        return web.json_response(body, dumps=ENCODER.encode)


def newest_that_fit(turns: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the newest turns, at least one, within MAX_PAGE_BYTES: an answer that is not taken is held in memory."""
    room = MAX_PAGE_BYTES
    for number, turn in enumerate(reversed(turns)):
        room -= len(ENCODER.encode(turn).encode())
        if number and room < 0:
            return turns[len(turns) - number :]
    return turns


def read_number(request: web.Request, name: str, default: int, most: int) -> int:
    """Return a number of the query; refuse what is not from 1 to `most`."""
    value = request.query.get(name, str(default))
    if not re.fullmatch("[0-9]{1,19}", value) or not 1 <= int(value) <= most:
        raise HttpRefusal("invalid_request")
    return int(value)


async def erase_session(request: web.Request) -> web.Response:
    """DELETE /api/sessions/{session_id}: erase the session with all that it said."""
    await request.app[API].erase(check_access(request))
    return web.Response(status=204)


# Health and the page


async def health(request: web.Request) -> web.Response:
    """GET /health: 200 while the database can be read, else 503."""
    api, status = request.app[API], 200
    try:
        await api.storage.ping()
    except StorageError:
        status = 503
    state = "ok" if status == 200 else "unavailable"
    body = {"status": state, "database": state, "ai": api.counsellor.name, "version": api.version}
    return web.json_response(body, status=status)


async def index(_: web.Request) -> web.Response:
    """GET /: the page."""
    try:
        page = await asyncio.to_thread(PAGE.read_text, encoding="utf-8")
    except FileNotFoundError:
        raise HttpRefusal("not_found") from None
    return web.Response(
        text=page, content_type="text/html", headers={"Content-Security-Policy": content_security_policy(page)}
    )


def content_security_policy(page: str) -> str:
    """Return the policy under which a page's own inline style and script run, and nothing else does."""

    def hashes(tag: str) -> str:
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
