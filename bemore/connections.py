"""Limits on connections: how many are open, and how long the first request header may take.

A client that is slow in any other way is the reverse proxy's job (docs/deployment.md).
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from aiohttp import web

# So many connections over the limit are answered with 503; further ones are cut.
SPARE_CONNECTIONS = 64

# Set on each request: its connection was over the limit when it was accepted.
SURPLUS = web.RequestKey("surplus", bool)


class LimitedServer(web.Server):
    """An aiohttp server that counts connections from their acceptance to their end.

    A connection that has not sent its first request header within `header_seconds` is cut.
    """

    def __init__(self, server: web.Server, max_connections: int, header_seconds: float, **options: Any) -> None:
        super().__init__(server.request_handler, request_factory=self.receive, **options)
        self.count = 0
        self._make = server.request_factory
        self._max_connections = max_connections
        self._header_seconds = header_seconds
        self._surplus: set[web.RequestHandler] = set()
        # Timers of the connections that have not sent a request yet.
        self._header_timers: dict[web.RequestHandler, asyncio.TimerHandle] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Count a connection; mark it where it is over the limit, and cut it where it is far over it."""
        super().connection_made(handler, transport)
        self.count += 1
        loop = asyncio.get_running_loop()
        self._header_timers[handler] = loop.call_later(self._header_seconds, transport.abort)
        if self.count > self._max_connections:
            self._surplus.add(handler)
        if self.count > self._max_connections + SPARE_CONNECTIONS:
            transport.abort()

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self.count -= 1
        self._surplus.discard(handler)
        self._stop_header_timer(handler)
        super().connection_lost(handler, exc)

    def receive(self, message: Any, payload: Any, protocol: web.RequestHandler, *rest: Any) -> web.BaseRequest:
        """Make the request whose header has arrived."""
        self._stop_header_timer(protocol)
        request = self._make(message, payload, protocol, *rest)
        request[SURPLUS] = protocol in self._surplus
        return request

    def _stop_header_timer(self, handler: web.RequestHandler) -> None:
        if (timer := self._header_timers.pop(handler, None)) is not None:
            timer.cancel()


class LimitedRunner(web.AppRunner):
    """Serve an application by a LimitedServer; `options` are those of aiohttp's connections."""

    def __init__(
        self,
        app: web.Application,
        *,
        max_connections: int,
        header_seconds: float,
        shutdown_timeout: float,
        **options: Any,
    ) -> None:
        super().__init__(app, shutdown_timeout=shutdown_timeout)
        self._limits = (max_connections, header_seconds)
        self._patience = shutdown_timeout
        self._options = options
        self._limited: LimitedServer | None = None

    @property
    def server(self) -> LimitedServer | None:
        """The server that each site of this runner accepts connections for."""
        return self._limited

    async def setup(self) -> None:
        await super().setup()
        plain = super().server
        assert plain is not None
        self._limited = LimitedServer(plain, *self._limits, **self._options)

    async def shutdown(self) -> None:
        """Close the connections; aiohttp calls this once its sites are stopped."""
        if self._limited is not None:
            self._limited.pre_shutdown()
        await super().shutdown()
        if self._limited is not None:
            await self._limited.shutdown(self._patience)


def make_site(runner: web.AppRunner, host: str, port: int) -> web.BaseSite:
    """Return where a runner listens; `::` stands for all addresses of IPv6 and IPv4."""
    if host == "::" and socket.has_dualstack_ipv6():
        return web.SockSite(runner, socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True))
    return web.TCPSite(runner, host, port)
