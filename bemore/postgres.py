"""Storage in Postgres; imported for a Postgres URL alone, since asyncpg takes 0.1 s and 5 MB."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg

from bemore.storage import SCHEMA, NotPermitted, Storage, Unavailable, UnknownSession

logger = logging.getLogger("bemore_voice")

MIN_CONNECTIONS, MAX_CONNECTIONS = 5, 20
GROW_SECONDS = 0.03  # that somebody waits before another connection is opened: it costs more than most statements
IDLE_SECONDS = 60  # after which a connection beyond the fifth is closed
DOUBT_SECONDS = 30  # of idleness, after which a connection may have been dropped on the way, and nobody told us
PROBE_SECONDS = 0.5  # for a connection in doubt to answer
CANCELS = 10  # of one statement, where the server sets it no time limit
CLOSE_SECONDS = 2  # for the connections of the pool to say goodbye

# Any constant will do: replicas that start together on an empty database take turns by it.
SCHEMA_LOCK = 0x62656D6F7265
FAULTS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
# What a prepared statement meets where a pooler in transaction mode runs it on another server connection than the one
# that it was prepared on. Nothing has been done by then: the server refuses it before it begins.
NOT_KEPT = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)


class Link:
    """A connection, and the statements that were prepared on it."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.idle_since = asyncio.get_running_loop().time()
        self.outdated = False  # what was prepared, since somebody has changed a table
        self._statements: dict[str, Any] = {}

    @property
    def open(self) -> bool:
        return not self.connection.is_closed()

    @property
    def doubtful(self) -> bool:
        return asyncio.get_running_loop().time() - self.idle_since > DOUBT_SECONDS

    async def answers(self, seconds: float, *, cancels: int = 0) -> bool:
        """Tell whether a probe is answered in time; what is under way may be cancelled, and the probe waits again."""
        probe = asyncio.ensure_future(self.fetch("SELECT 1", ()))
        try:
            for left in range(cancels, -1, -1):
                await asyncio.wait([probe], timeout=seconds)
                if probe.done() or not left:
                    break
                # A pooler may have passed the statement on only after it was told to cancel it.
                self.connection._cancel_current_command(asyncio.get_running_loop().create_future())  # type: ignore[attr-defined]
        finally:
            probe.cancel()
        return probe.done() and not probe.cancelled() and probe.exception() is None

    async def fetch(self, sql: str, values: Sequence[object]) -> Sequence[Any]:
        rows: Sequence[Any] = await self.connection.fetch(sql, *values)
        return rows

    async def fetch_prepared(self, sql: str, values: Sequence[object]) -> Sequence[Any]:
        """Run a statement that the server parses and plans once a connection."""
        statement = self._statements.get(sql)
        if statement is None:
            # Named by what it says: whoever else comes to the same server connection means the same by that name.
            name = "bemore_" + hashlib.sha256(sql.encode()).hexdigest()[:16]
            statement = self._statements[sql] = await self.connection.prepare(sql, name=name)
        rows: Sequence[Any] = await statement.fetch(*values)
        return rows


class Pool:
    """Links that are lent for a statement each; more are opened one after another, while somebody waits for long.

    Whoever waits takes the first that comes free, an old or a new one: asyncpg's own pool has each wait for one that is
    opened for it, and a burst for fifteen of them.
    """

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, Link]]) -> None:
        self._connect = connect
        self._free: list[Link] = []  # the last used at the end
        self._waiting: deque[asyncio.Future[Link]] = deque()
        self._links: set[Link] = set()
        self._opening: asyncio.Task[None] | None = None
        self._shrinking: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Open as many as are always there; raise what the first that fails did."""
        opened = await asyncio.gather(*(self._connect() for _ in range(MIN_CONNECTIONS)), return_exceptions=True)
        self._links = {link for link in opened if isinstance(link, Link)}
        self._free = list(self._links)
        for failure in opened:
            if isinstance(failure, BaseException):
                raise failure

    async def close(self) -> None:
        for handle in (self._opening, self._shrinking):
            if handle is not None:
                handle.cancel()
        links, self._links, self._free = self._links, set(), []
        with contextlib.suppress(*FAULTS):
            await asyncio.gather(*(link.connection.close(timeout=CLOSE_SECONDS) for link in links))

    async def take(self) -> Link:
        """Return a link, at once or as soon as one is free; raise what opening the only one failed by."""
        while self._free:
            link = self._free.pop()
            if link.open:
                return link
            self._links.discard(link)
        waiter: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._grow()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.give_back(waiter.result())
            raise

    def drop(self, link: Link) -> None:
        """Close a link that does not answer, and those that have been idle in doubt as it was."""
        for other in [link, *(other for other in self._free if other.doubtful)]:
            other.connection.terminate()
        self.give_back(link)

    def doubt(self) -> None:
        """Have every idle link asked before it is used again: one has not answered."""
        for link in self._free:
            link.idle_since = -math.inf

    def give_back(self, link: Link) -> None:
        link.idle_since = asyncio.get_running_loop().time()
        if not link.open:
            self._links.discard(link)
            self._grow()
        elif (waiter := self._next_waiter()) is not None:
            waiter.set_result(link)
        else:
            self._free.append(link)
            self._shrink_later()

    def _next_waiter(self) -> asyncio.Future[Link] | None:
        while self._waiting:
            if not (waiter := self._waiting.popleft()).done():
                return waiter
        return None

    def _grow(self) -> None:
        """Open another link where somebody waits for one, unless that is under way."""
        if self._wanted and self._opening is None and len(self._links) < MAX_CONNECTIONS:
            self._opening = asyncio.create_task(self._open_one())

    @property
    def _wanted(self) -> bool:
        return any(not waiter.done() for waiter in self._waiting)

    async def _open_one(self) -> None:
        try:
            if self._links:
                await asyncio.sleep(GROW_SECONDS)
            if not self._wanted:
                return
            link = await self._connect()
        except FAULTS as error:
            self._fail(error)
            return
        finally:
            self._opening = None
        self._links.add(link)
        self.give_back(link)
        self._grow()

    def _fail(self, error: Exception) -> None:
        """Tell all who wait why there is no link, unless another may still come free."""
        while not self._links and (waiter := self._next_waiter()) is not None:
            waiter.set_exception(error)

    def _shrink_later(self) -> None:
        if self._shrinking is None and len(self._links) > MIN_CONNECTIONS:
            self._shrinking = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._shrink)

    def _shrink(self) -> None:
        """Let go of what nobody has needed for a while; the least recently used are at the front."""
        self._shrinking = None
        now = asyncio.get_running_loop().time()
        while self._free and len(self._links) > MIN_CONNECTIONS and now - self._free[0].idle_since >= IDLE_SECONDS:
            link = self._free.pop(0)
            self._links.discard(link)
            link.connection.terminate()
        self._shrink_later()


class Postgres(Storage):
    """A pool of 5 to 20 connections, directly or through a pooler in transaction mode.

    Statements are prepared until one turns out not to be kept, as behind some poolers. One that is given up is
    cancelled at the server, which ends it by itself, too, where it can be told how long it may take.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout  # seconds, for one statement
        self._pool = Pool(self._connect)
        self.prepares = True
        self._limits: dict[str, str] = {"statement_timeout": f"{timeout * 1000:.0f}"}
        self._limits_kept = False  # by the server, as far as is known
        self._given_up: set[asyncio.Task[None]] = set()
        parts = urlsplit(url)  # what stands before an @ is nobody's business
        self.where = f"Postgres {parts.netloc.rpartition('@')[2] or '(local socket)'}{parts.path}"

    async def __aenter__(self) -> Self:
        try:
            await self._pool.open()
            await self._apply_schema()
            await self._prepare_links()
        except (*FAULTS, ValueError) as error:
            await self.__aexit__()
            raise Unavailable(type(error).__name__) from None
        return self

    async def _connect(self) -> Link:
        limits = self._limits
        try:
            link = await self._connect_within(limits)
        except asyncpg.ProtocolViolationError:
            if not limits:
                raise
            self._limits = {}  # a pooler that passes no settings on
            return await self._connect_within({})
        if limits and not self._limits_kept:
            await self._find_limits(link, limits["statement_timeout"])
        return link

    async def _find_limits(self, link: Link, wanted: str) -> None:
        """Find out whether the server has the time limit: some poolers take settings, and keep them away."""
        setting = "SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"
        try:
            self._limits_kept = await link.connection.fetchval(setting, timeout=self._timeout) == wanted
        except BaseException:
            link.connection.terminate()  # nobody has it yet
            raise
        if not self._limits_kept:
            self._limits = {}

    async def _connect_within(self, limits: dict[str, str]) -> Link:
        return Link(
            await asyncpg.connect(self._url, timeout=self._timeout, statement_cache_size=0, server_settings=limits)
        )

    async def _apply_schema(self) -> None:
        """Apply schema.sql where something is missing: it locks tables, which other replicas may be using."""
        with contextlib.suppress(Unavailable):
            await self.ping()
            return
        schema = SCHEMA.read_text(encoding="utf-8")
        link = await self._pool.take()
        try:
            # Without arguments it is one simple query, and so one transaction, which the lock lasts for.
            await link.connection.execute(
                f"SET LOCAL statement_timeout = 0; SELECT pg_advisory_xact_lock({SCHEMA_LOCK});\n{schema}"
            )
        finally:
            self._pool.give_back(link)

    async def _prepare_links(self) -> None:
        """Have each connection know the statements of a turn before many ask at once."""
        with contextlib.suppress(Unavailable):  # a request will find the same, and say so
            await asyncio.gather(*(self.ping() for _ in range(MIN_CONNECTIONS)))

    async def __aexit__(self, *_: object) -> None:
        for task in self._given_up:
            task.cancel()
        await self._pool.close()

    async def fetch(self, sql: str, *values: object) -> Sequence[Any]:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._run(await self._take(), sql, values)
        except asyncpg.ForeignKeyViolationError:
            raise UnknownSession from None
        except (asyncpg.InsufficientPrivilegeError, asyncpg.NotNullViolationError) as error:
            raise NotPermitted(f"database: {type(error).__name__}") from None
        except FAULTS as error:
            if isinstance(error, TimeoutError):
                self._pool.doubt()
            raise Unavailable(f"database: {type(error).__name__}") from None

    async def _take(self) -> Link:
        """Return a link that is there: a balancer or a NAT may have dropped idle ones without a word."""
        while (link := await self._pool.take()).doubtful:
            alive = False
            try:
                alive = await link.answers(PROBE_SECONDS)
            finally:
                if not alive:
                    self._pool.drop(link)
            if alive:
                break
        return link

    async def _run(self, link: Link, sql: str, values: Sequence[object]) -> Sequence[Any]:
        """Run a statement, and give the link back once it is over at the server too."""
        given_up = False
        try:
            return await self._fetch(link, sql, values)
        except asyncio.CancelledError:
            given_up = True
            raise
        finally:
            if given_up:
                self._settle_later(link)
            else:
                self._pool.give_back(link)

    async def _fetch(self, link: Link, sql: str, values: Sequence[object]) -> Sequence[Any]:
        if self.prepares and not link.outdated:
            try:
                return await link.fetch_prepared(sql, values)
            except NOT_KEPT:
                if self.prepares:
                    logger.info("%s: a pooler does not keep prepared statements, so none are used", self.where)
                self.prepares = False
            except asyncpg.InvalidCachedStatementError:
                link.outdated = True  # refused before it began, too
        return await link.fetch(sql, values)

    def _settle_later(self, link: Link) -> None:
        settling = asyncio.create_task(self._settle(link))
        self._given_up.add(settling)
        settling.add_done_callback(self._given_up.discard)

    async def _settle(self, link: Link) -> None:
        """Wait for what was given up, which asyncpg cancels; by its time limit the server has ended it by itself.

        Behind a pooler that keeps the limit away it would wait on at the server: the link is let go when it ends.
        """
        over = False
        try:
            over = await link.answers(self._timeout, cancels=0 if self._limits else CANCELS)
        finally:
            if not over:
                link.connection.terminate()
            self._pool.give_back(link)

    async def settled(self) -> None:
        if self._given_up and (await asyncio.wait(self._given_up, timeout=self._timeout))[1]:
            raise Unavailable("database: what was given up is not over")
