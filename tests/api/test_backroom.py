"""Processes beside a server's own."""

from __future__ import annotations

import asyncio
import os

from autoeff.api.backroom import Backroom


def test_closing_ends_no_process_of_another() -> None:
    async def pid(room: Backroom) -> int:
        return await room.ask("pid", os.getpid)

    async def both() -> None:
        one, other = Backroom(), Backroom()
        try:
            first, second = await pid(one), await pid(other)
            assert len({os.getpid(), first, second}) == 3
            one.close()
            assert await pid(other) == second
        finally:
            other.close()

    asyncio.run(both())
