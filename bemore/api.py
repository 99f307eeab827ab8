"""The HTTP routes: sessions, conversations, health and the page."""

from __future__ import annotations

import asyncio
import html
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from aiohttp import web

from bemore import access
from bemore.counsellor import Counsellor
from bemore.refusals import HttpRefusal, forwarded, guard
from bemore.settings import Settings
from bemore.storage import Storage, StorageError

# The folder of the page, its style and its script.
HERE = Path(__file__).parent.parent

DEFAULT_PAGE_TURNS = 50
MAX_PAGE_TURNS = 200
MAX_ID = 2**63 - 1
# The page may load its own style and script and talk to its own server, and nothing else.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))


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


def add_routes(app: web.Application) -> None:
    """Add the HTTP routes, and check all requests of the application; app[API] is set before."""
    guard(app, app[API].settings, app[API].monotonic)
    app.router.add_post("/api/sessions", make_session)
    app.router.add_get("/api/sessions/{session_id:[^/]*}/conversations", read_conversations, allow_head=False)
    app.router.add_delete("/api/sessions/{session_id:[^/]*}", erase_session)
    app.router.add_get("/livez", livez)
    app.router.add_get("/health", health)
    app.router.add_get("/", index)
    app.router.add_get("/demo.css", asset)
    app.router.add_get("/demo.js", asset)


# Sessions and conversations


def check_access(request: web.Request, *, token_required: bool = True, expired_accepted: bool = False) -> str:
    """Return the id of the session that a request is about; refuse a bad id and, with tokens in use, a bad token."""
    api, session_id, token = request.app[API], request.match_info["session_id"], token_of(request)
    if not access.is_session_id(session_id):
        raise HttpRefusal("invalid_session_id")
    keys = api.settings.jwt_secret_key
    if keys and (token or token_required):
        expires = access.token_expiry(session_id, token, keys)
        if expires is None or (expires <= api.clock() and not expired_accepted):
            raise HttpRefusal("invalid_token", setting="JWT_SECRET_KEY")
    return session_id


def token_of(request: web.Request) -> str:
    """Return the token that a request brings; empty for none."""
    return access.token_in(request.headers.get("Authorization", ""), request.query.get("token", ""))


async def make_session(request: web.Request) -> web.Response:
    """POST /api/sessions: make a session and return where to talk to it."""
    api = request.app[API]
    address = access.rate_limit_key(request.remote or "", forwarded(request, "X-Forwarded-For"))
    if wait := api.admit_address(address):
        raise HttpRefusal("too_many_sessions", retry_after=wait, setting="MAX_NEW_SESSIONS_PER_MINUTE")
    session_id = secrets.token_urlsafe(24)
    await api.storage.create_session(session_id)
    body = {"session_id": session_id, "websocket_path": f"/ws/session/{session_id}"}
    if api.settings.jwt_secret_key:
        expires = int(api.clock() + api.settings.session_ttl_hours * 3600)
        body["token"] = access.issue_token(api.settings.jwt_secret_key[0], session_id, expires)
    return web.json_response(body, status=201)


async def read_conversations(request: web.Request) -> web.Response:
    """GET /api/sessions/{session_id}/conversations: a page of turns, the newest by default."""
    session_id = check_access(request, expired_accepted=True)
    limit = read_number(request, "limit", DEFAULT_PAGE_TURNS, MAX_PAGE_TURNS)
    before = read_number(request, "before", MAX_ID, MAX_ID)
    turns = await request.app[API].storage.conversations(session_id, limit, before)
    body = {"session_id": session_id, "conversations": turns}
    return web.json_response(body, dumps=ENCODER.encode)


def read_number(request: web.Request, name: str, default: int, most: int) -> int:
    """Return a number of the query; refuse what is not from 1 to `most`."""
    value = request.query.get(name, str(default))
    if not re.fullmatch("[0-9]{1,19}", value) or not 1 <= int(value) <= most:
        raise HttpRefusal("invalid_request")
    return int(value)


async def erase_session(request: web.Request) -> web.Response:
    """DELETE /api/sessions/{session_id}: erase the session with all that it said."""
    await request.app[API].erase(check_access(request, expired_accepted=True))
    return web.Response(status=204)


# Health and the page


async def livez(_: web.Request) -> web.Response:
    """GET /livez: 200 as long as the process serves; a restart does not help against a database that is away."""
    return web.json_response({"status": "ok"})


async def health(request: web.Request) -> web.Response:
    """GET /health: 200 while the database can be read, else 503; the state of the model changes no status."""
    api, status = request.app[API], 200
    try:
        await api.storage.ping()
    except StorageError:
        status = 503
    state = "ok" if status == 200 else "unavailable"
    body = {"status": state, "database": state, "ai": api.counsellor.name, "version": api.version}
    return web.json_response({**body, "model": api.model_health.state()}, status=status)


async def index(request: web.Request) -> web.Response:
    """GET /: the page, with what it needs to know as attributes of its body."""
    api, page = request.app[API], await read_file("demo.html")
    attributes = {
        "answers": api.counsellor.kind,
        "model": api.counsellor.name,
        "keep-days": f"{api.settings.keep_days:g}",
        "notice-url": api.settings.notice_url,
    }
    data = " ".join(f'data-{name}="{html.escape(str(value))}"' for name, value in attributes.items())
    headers = {"Content-Security-Policy": PAGE_POLICY}
    return web.Response(text=page.replace("<body", f"<body {data}", 1), content_type="text/html", headers=headers)


async def asset(request: web.Request) -> web.Response:
    """GET /demo.css and /demo.js: the page's style and script."""
    content_type = {"/demo.css": "text/css", "/demo.js": "text/javascript"}[request.path]
    return web.Response(text=await read_file(request.path[1:]), content_type=content_type)


async def read_file(name: str) -> str:
    try:
        return await asyncio.to_thread((HERE / name).read_text, encoding="utf-8")
    except FileNotFoundError:
        raise HttpRefusal("not_found") from None
