"""What every request has to meet, how a refused one is answered, and the headers of every answer."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from aiohttp.http import HttpProcessingError

from bemore import access
from bemore.connections import SURPLUS
from bemore.log import LogLimit, describe_bug, logfmt
from bemore.settings import Settings
from bemore.storage import NotPermitted, Unavailable, UnknownSession

logger = logging.getLogger("bemore_voice")

# No route needs a body, but some clients send an empty object.
MAX_BODY_BYTES = 16 * 1024
BODY_SECONDS = 10
# After this time a client that found the server full may try again.
FULL_RETRY_SECONDS = 10
MAX_LOGGED_ORIGIN_CHARACTERS = 100
# The routes that a load balancer asks, also on a full server.
PROBES = ("/livez", "/health")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HTTP_ERRORS = {
    "invalid_request": (400, "요청 형식이 올바르지 않습니다"),
    "invalid_session_id": (400, "세션 ID가 올바르지 않습니다"),
    "invalid_token": (401, "인증 정보가 올바르지 않습니다"),
    "origin_not_allowed": (403, "허용되지 않은 출처의 요청입니다"),
    "sessions_managed_elsewhere": (403, "이 서버에서는 세션을 만들거나 지울 수 없습니다"),
    "not_found": (404, "요청하신 주소를 찾을 수 없습니다"),
    "unknown_session": (404, "세션을 찾을 수 없습니다"),
    "method_not_allowed": (405, "지원하지 않는 요청 방식입니다"),
    "request_timeout": (408, "요청 시간이 초과되었습니다"),
    "body_too_large": (413, "요청이 너무 큽니다"),
    "upgrade_required": (426, "웹소켓으로 연결해주세요"),
    "too_many_sessions": (429, "새 대화를 너무 자주 시작했습니다. 잠시 후 다시 시도해주세요"),
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
    """One of HTTP_ERRORS, as the answer to a request; `retry_after` in seconds.

    A refusal with `logged` details is logged with them, such as the setting that would have admitted the request.
    """

    def __init__(self, code: str, retry_after: float | None = None, **logged: str) -> None:
        super().__init__(code)
        self.code = code
        self.logged = logged
        self.headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}


SETTINGS = web.AppKey("settings", Settings)
LOOPBACK_ONLY = web.AppKey("loopback_only", bool)
LOG_LIMIT = web.AppKey("log_limit", LogLimit)


def guard(app: web.Application, settings: Settings, monotonic: Callable[[], float]) -> None:
    """Have all requests of an application checked, and all its answers given their headers."""
    app[SETTINGS] = settings
    app[LOOPBACK_ONLY] = access.is_loopback(settings.host)
    app[LOG_LIMIT] = LogLimit(monotonic)
    app.middlewares.append(answer_refusals)
    app.on_response_prepare.append(add_headers)


# Refusals


@web.middleware
async def answer_refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check what every request has to meet, and turn each exception into one of HTTP_ERRORS."""
    headers: Mapping[str, str] = {}
    try:
        check_room(request)
        check_origin(request)
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return preflight(request)
        await pass_over_body(request)
        return await handler(request)
    except HttpRefusal as refusal:
        code, headers = refusal.code, refusal.headers
        if refusal.logged and request.app[LOG_LIMIT].is_due(code):
            logger.warning("%s", logfmt(refused=code, **refusal.logged))
    except UnknownSession:
        code = "unknown_session"
    except NotPermitted:
        code = "sessions_managed_elsewhere"
    except Unavailable as error:
        code = "unavailable"
        log_failure(logging.WARNING, request, error.cause)
    except web.HTTPNotFound:
        code = "not_found"
    except web.HTTPMethodNotAllowed as error:
        code, headers = "method_not_allowed", {"Allow": error.headers["Allow"]}
    except ConnectionError:
        # The client has left.
        raise
    except Exception as bug:
        code = "internal_error"
        log_failure(logging.ERROR, request, describe_bug(bug))
        if request.writer.output_size:
            # The answer has begun, or the connection is a WebSocket by now: it can only be cut.
            raise ConnectionResetError from None
    return refusal_answer(code, headers)


def log_failure(level: int, request: web.Request, cause: str) -> None:
    """Log that a request failed, with its route in place of its path, which holds the session's id."""
    resource = request.match_info.route.resource
    route = "" if resource is None else resource.canonical
    logger.log(level, "%s", logfmt(method=request.method, route=route, cause=cause))


def refusal_answer(code: str, headers: Mapping[str, str]) -> web.Response:
    status, sentence = HTTP_ERRORS[code]
    return web.json_response({"error": sentence, "code": code}, status=status, headers=headers)


def check_room(request: web.Request) -> None:
    """Refuse a request on a connection over the limit; a load balancer may still ask for the server's health."""
    if request.get(SURPLUS) and request.path not in PROBES:
        raise HttpRefusal("too_many_connections", retry_after=FULL_RETRY_SECONDS, setting="MAX_CONNECTIONS")


def check_origin(request: web.Request) -> None:
    """Refuse a request of a page whose origin may not talk to this server."""
    settings = request.app[SETTINGS]
    scheme = access.http_scheme(forwarded(request, "X-Forwarded-Proto") or request.scheme)
    origin, own = request.headers.get("Origin"), f"{scheme}://{request.host}"
    guard_name = request.app[LOOPBACK_ONLY] and not settings.trust_proxy
    if not access.is_welcome(origin, own, settings.allowed_origins, guard_name=guard_name, name=settings.host):
        proxy_scheme = access.last_forwarded(request.headers.getall("X-Forwarded-Proto", []))
        setting = access.setting_that_admits(own, proxy_scheme, trust_proxy=settings.trust_proxy)
        shown = (origin or own)[:MAX_LOGGED_ORIGIN_CHARACTERS]
        raise HttpRefusal("origin_not_allowed", origin=shown, setting=setting)


def forwarded(request: web.Request, name: str) -> str:
    """Return the nearest proxy's value of a header, where proxies are trusted."""
    if not request.app[SETTINGS].trust_proxy:
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
    except (web.RequestPayloadError, HttpProcessingError):
        raise HttpRefusal("invalid_request") from None


# Headers


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the security headers and those of CORS, and close a connection over the limit."""
    headers = response.headers
    headers.add("Vary", "Origin")
    if (origin := request.headers.get("Origin")) in request.app[SETTINGS].allowed_origins:
        headers["Access-Control-Allow-Origin"] = str(origin)
        headers["Access-Control-Allow-Credentials"] = "true"
        headers["Access-Control-Expose-Headers"] = "Retry-After"
    if request.get(SURPLUS):
        # aiohttp has prepared its own headers by now, so that force_close() alone would not tell the client.
        response.force_close()
        headers["Connection"] = "close"
    # The page has a policy of its own.
    policy = headers.get("Content-Security-Policy", SECURITY_HEADERS["Content-Security-Policy"])
    headers.update({**SECURITY_HEADERS, "Content-Security-Policy": policy})


def preflight(request: web.Request) -> web.Response:
    """Tell a browser that the routes' methods and any header are allowed, as its CORS preflight asks."""
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Max-Age": "600",
        "Vary": "Access-Control-Request-Headers",
    }
    wanted = request.headers.get("Access-Control-Request-Headers", "")
    # aiohttp fails at sending what is not UTF-8.
    if wanted.isascii():
        headers["Access-Control-Allow-Headers"] = wanted
    return web.Response(status=204, headers=headers)
