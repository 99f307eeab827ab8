"""Erases sessions that are older than KEEP_DAYS."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from bemore.storage import Storage, Unavailable

logger = logging.getLogger("bemore_voice")

FIRST_SECONDS, EVERY_SECONDS = 2, 3600  # after the start, and then
BATCH_PAUSE_SECONDS = 0.1  # in which other statements have their turn


async def keep_erasing(
    storage: Storage, days: float, stop: asyncio.Event, *, first: float = FIRST_SECONDS, every: float = EVERY_SECONDS
) -> None:
    """Erase what is older than `days`, `first` seconds from now and then every `every` seconds, until `stop` is set."""
    seconds = first
    while not await is_set_within(stop, seconds):
        await erase_old(storage, days, stop)
        seconds = every


async def erase_old(storage: Storage, days: float, stop: asyncio.Event) -> None:
    """Erase batch by batch until none is left, or `stop` is set."""
    erased = 0
    try:
        while not stop.is_set() and (batch := await storage.erase_older_than(days)):
            erased += batch
            await is_set_within(stop, BATCH_PAUSE_SECONDS)
    except Unavailable as error:
        logger.warning("KEEP_DAYS: old sessions could not be erased (%s), next try in an hour", error.cause)
    if erased:
        logger.info("KEEP_DAYS: erased %d sessions without a turn in %g days", erased, days)


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
