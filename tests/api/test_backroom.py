"""Processes beside a server's own."""

from __future__ import annotations

import asyncio
import os
import signal

from autoeff.api.backroom import Backroom


async def pid(room: Backroom) -> int:
    return await room.ask("pid", os.getpid)


def test_ctrl_c_is_for_the_server_to_hear() -> None:
    async def asked() -> None:
        room = Backroom()
        try:
            first = await pid(room)
            os.kill(first, signal.SIGINT)
            assert await pid(room) == first
        finally:
            room.close()

    asyncio.run(asked())


def test_closing_ends_no_process_of_another() -> None:
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
