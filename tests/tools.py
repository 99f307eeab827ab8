"""What the tests of one module need, without the server: patience, and a database of either engine."""

import asyncio
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from bemore.postgres import Postgres
from bemore.sqlite import SQLite
from bemore.storage import Storage

PATIENCE = 20  # seconds that a test waits for anything before it fails


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what no event tells of."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the point of it
            await asyncio.sleep(0.001)


def program_of(*names: str) -> str:
    """Return the path of a program by one of its names. Without it a test is skipped; in CI it fails."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if (found := next(filter(None, (shutil.which(name, path=path) for name in names)), None)) is None:
        assert not os.environ.get("CI"), f"{names[0]} is missing"
        pytest.skip(f"{names[0]} is not installed")
    return found


def open_storage(url: str, timeout: float = 5) -> Storage:
    return SQLite(url, timeout) if url.startswith("sqlite:") else Postgres(url, timeout, start_seconds=0)
