"""Marks sessions as at risk in the database: the only write that is retried without a time limit."""

from __future__ import annotations

import asyncio
import logging

from bemore.log import anonymous
from bemore.storage import NotPermitted, Storage, Unavailable, UnknownSession

logger = logging.getLogger("bemore_voice")


class RiskMarks:
    """Mark sessions as at risk, one after another, until the database has taken each mark; one task for the process."""

    def __init__(self, storage: Storage, *, create: bool, retry_seconds: float) -> None:
        self._storage, self._create, self._retry_seconds = storage, create, retry_seconds
        self._waiting: set[str] = set()
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def add(self, session_id: str) -> None:
        self._waiting.add(session_id)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def discard(self, session_id: str) -> None:
        """Give up the mark of a session that is about to be erased; a mark that is being written is waited for."""
        async with self._writing:
            self._waiting.discard(session_id)

    async def finish(self, seconds: float) -> None:
        """Wait until all marks are written, for so many seconds at most."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)
            self._task.cancel()

    async def _work(self) -> None:
        while self._waiting:
            for session_id in list(self._waiting):
                async with self._writing:
                    if session_id in self._waiting:
                        await self._mark(session_id)
            if self._waiting:
                await asyncio.sleep(self._retry_seconds)

    async def _mark(self, session_id: str) -> None:
        try:
            await self._storage.mark_at_risk(session_id, create=self._create)
        except NotPermitted as error:
            # A retry would be refused as well.
            logger.warning("session=%s outcome=not_marked cause=%r", anonymous(session_id), error.cause)
        except Unavailable:
            return
        except UnknownSession:
            pass
        self._waiting.discard(session_id)
