"""Who may connect: session ids, origins, hosts, addresses and tokens, as rules over strings."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

# The database column's width.
MAX_SESSION_ID_CHARACTERS = 255


def is_session_id(text: str) -> bool:
    """Tell whether a session may have this id."""
    return 1 <= len(text) <= MAX_SESSION_ID_CHARACTERS and text.isprintable()


# Origins and hosts


def is_welcome(origin: str | None, own: str, allowed: frozenset[str], *, guard_name: bool, name: str = "") -> bool:
    """Tell whether a page of this origin may talk to the server, whose own origin is `own`.

    A request without Origin comes from the server's own page or from a program that is no browser. `guard_name`, for a
    server that only this machine reaches, also refuses requests to an unknown host name: any page can let its name
    point to 127.0.0.1 and so be of the same origin as a server there (DNS rebinding). `name` is the setting HOST.
    """
    if origin in allowed:
        return True
    if guard_name and not is_own_name(own.partition("://")[2], allowed, name):
        return False
    return origin in (None, own)


def http_scheme(scheme: str) -> str:
    """Return the scheme of a page's origin for the scheme that a proxy names; some name a WebSocket's."""
    return {"ws": "http", "wss": "https"}.get(scheme.lower(), scheme.lower())


def setting_that_admits(own: str, forwarded_scheme: str, *, trust_proxy: bool) -> str:
    """Return the setting that would admit a refused origin: a proxy that is not trusted may name another scheme."""
    if not trust_proxy and forwarded_scheme and http_scheme(forwarded_scheme) != own.partition("://")[0]:
        return "TRUST_PROXY"
    return "ALLOWED_ORIGINS"


def is_loopback(host: str) -> bool:
    """Tell whether all addresses of a host are loopback, so that only this machine reaches a server there.

    The host may be written in any way, such as LOCALHOST, 127.1 or 0:0:0:0:0:0:0:1. May wait for a name server.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        # The server cannot listen there either.
        return False
    addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in addresses)


def is_own_name(host: str, allowed: frozenset[str], own: str = "") -> bool:
    """Tell whether a Host header is an IP address, localhost, `own` or the host of an allowed origin."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in ("localhost", own.lower() or None) or name in {urlsplit(origin).hostname for origin in allowed}:
        return True
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


# Addresses


def last_forwarded(headers: list[str]) -> str:
    """Return what the nearest proxy added to a header; the client may have written all before that."""
    return headers[-1].rpartition(",")[2].strip() if headers else ""


def rate_limit_key(peer: str, forwarded: str = "") -> str:
    """Return what a rate limit counts by: the address that a proxy names, else the peer's; of IPv6 the /64 network."""
    address = forwarded or peer
    # Azure writes a port behind the address.
    if with_port := re.fullmatch(r"(?:\[(.+)\]|([\d.]+))(?::\d+)?", address):
        address = with_port[1] or with_port[2]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return peer
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


# Tokens: HS256 JWTs whose subject is a session's id. PyJWT is imported late: its import takes a fifth of the start.


def issue_token(secret: str, session_id: str, expires: int) -> str:
    """Return a token for one session that is valid until `expires`, in seconds since the epoch."""
    import jwt

    return jwt.encode({"sub": session_id, "exp": expires}, secret, algorithm="HS256")


def token_in(authorization: str, query: str) -> str:
    """Return the token of a request, from its Authorization header or its query; empty for none."""
    scheme, _, token = authorization.partition(" ")
    return token if scheme.lower() == "bearer" else query


def token_expiry(session_id: str, token: str, secrets: Sequence[str]) -> int | None:
    """Return when a token of this session expires, in seconds since the epoch; None for any other token.

    The moment may have passed. A token counts as the session's where one of `secrets` has signed it.
    """
    if not token:
        return None
    import jwt

    options: Any = {"require": ["sub", "exp"], "verify_exp": False}
    for secret in secrets:
        try:
            claims = jwt.decode(token, secret, algorithms=["HS256"], options=options)
        # A token that is not UTF-8 reaches this point as halves of surrogate pairs, which raise UnicodeError.
        except (jwt.InvalidTokenError, UnicodeError):
            continue
        if claims["sub"] == session_id and isinstance(claims["exp"], int):
            return int(claims["exp"])
    return None


def fresh_token(session_id: str, token: str, secrets: Sequence[str], ttl_seconds: float, now: float) -> str:
    """Return a new token in place of one that has less than half of its life left; empty where none is due."""
    expires = token_expiry(session_id, token, secrets)
    if expires is None or expires - now >= ttl_seconds / 2:
        return ""
    return issue_token(secrets[0], session_id, int(now + ttl_seconds))
