"""Who may connect: origins, hosts, tokens and addresses, as rules over strings."""

from __future__ import annotations

import ipaddress
import itertools
import re
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

# Origins and hosts


def is_welcome(origin: str | None, own: str, allowed: frozenset[str], *, guard_name: bool, name: str = "") -> bool:
    """Tell whether a page of this origin may talk to the server, whose own origin is `own`.

    What sends no Origin is no browser's page, or is the server's own. `guard_name`, for a server that only this
    machine reaches, also refuses where its own name is a stranger's: any page can let its name point to 127.0.0.1, and
    be of the same origin as a server that listens there (DNS rebinding). `name` is what the server was told to be.
    """
    if origin in allowed:
        return True
    if guard_name and not is_own_name(own.partition("://")[2], allowed, name):
        return False
    return origin in (None, own)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a server on a host: whether all addresses that it stands for are loopback.

    However it is written: LOCALHOST, 127.1 and 0:0:0:0:0:0:0:1 are, 0 is every address. May wait for a name server.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return False  # nor can anything listen there
    addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in addresses)


def is_own_name(host: str, allowed: frozenset[str], own: str = "") -> bool:
    """Tell whether a Host header names this machine, as no stranger's domain can, by `own` or as an allowed origin."""
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
    """Return what the nearest proxy added to a header; all before that may be anyone's invention."""
    return headers[-1].rpartition(",")[2].strip() if headers else ""


def rate_limit_key(peer: str, forwarded: str = "") -> str:
    """Return the address to count by: the one that a proxy names, an IPv6 one by its first half (one household's)."""
    address = forwarded or peer
    if dressed := re.fullmatch(r"(?:\[(.+)\]|([\d.]+))(?::\d+)?", address):  # with a port, as Azure writes it
        address = dressed[1] or dressed[2]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return peer
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class AddressLimit:
    """Token buckets by address, in memory: full they allow a minute's worth at once; each replica has its own.

    A bucket is told whole by the moment at which it is full again, by a clock that never steps back.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._clock = clock  # seconds
        self._refill_us = 60_000_000 // per_minute
        self._bucket_us = self._refill_us * per_minute
        self._full_at_us: dict[str, int] = {}  # the least recently used first

    def __len__(self) -> int:
        """Count the addresses that are remembered: those whose buckets are not full."""
        return len(self._full_at_us)

    def take(self, address: str) -> int:
        """Take a token and return 0, or return the seconds until there is one."""
        now_us = int(self._clock() * 1_000_000)
        for other in list(itertools.takewhile(lambda other: self._full_at_us[other] <= now_us, self._full_at_us)):
            del self._full_at_us[other]
        full_at_us = max(self._full_at_us.get(address, 0), now_us) + self._refill_us
        if (early_us := full_at_us - now_us - self._bucket_us) > 0:
            return -(-early_us // 1_000_000)
        self._full_at_us.pop(address, None)
        self._full_at_us[address] = full_at_us
        return 0


# Tokens: HS256 JWTs whose subject is a session's id. PyJWT's import is a fifth of the start, and few set a secret.


def issue_token(secret: str, session_id: str, expires: int) -> str:
    """Return a token for one session that holds until `expires`, in seconds since the epoch."""
    import jwt

    return jwt.encode({"sub": session_id, "exp": expires}, secret, algorithm="HS256")


def token_in(authorization: str, query: str) -> str:
    """Return the token that a request brings, by its Authorization header or its query; empty for none."""
    scheme, _, token = authorization.partition(" ")
    return token if scheme.lower() == "bearer" else query


def is_token_for(session_id: str, token: str, secret: str) -> bool:
    """Tell whether a token is one of ours, still holds, and is for this session."""
    import jwt

    options: Any = {"require": ["sub", "exp"]}
    try:
        claims = jwt.decode(token, secret, algorithms=["HS256"], options=options)
    except (jwt.InvalidTokenError, UnicodeError):  # bytes that are no UTF-8 come as halves of surrogate pairs
        return False
    return bool(claims["sub"] == session_id)
