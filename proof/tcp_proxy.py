"""Connections that can be cut, refused, slowed and stalled, one way or both.

Owns the bytes between two parts while they are under way; must never change or invent
one, or let one overtake another: what TCP promises holds, as long as it holds at all.

    client -> Link (a port of 127.0.0.1) -> one of the link's targets
               |
               +-- cut, refuse, slow, stall: set by any thread, until `heal`
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from demo.server_process import LOOPBACK, free_port

T = TypeVar("T")

#: As (host, port).
Target = tuple[str, int]

_CHUNK_BYTES: Final = 64 * 1024
_CONNECT_TIMEOUT_S: Final = 5.0
#: Whatever is asked of the proxy's thread is done in a moment.
_TIMEOUT_S: Final = 10.0
#: Close with a reset: neither side may take it for an orderly end.
_RESET: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Weather:
    """What a link does to bytes that pass."""

    #: Seconds that each chunk is late, in either direction.
    delay_s: float = 0.0
    #: Bytes towards the target are kept until the link is healed.
    are_requests_stalled: bool = False
    #: Bytes from the target are kept until the link is healed.
    are_answers_stalled: bool = False
    #: Nobody listens.
    is_refused: bool = False


FAIR: Final = Weather()


class Link:
    """A port that leads to one of several targets, chosen anew for each connection.

    All methods may be called from any thread. What a stall keeps is delivered when it
    ends, also when its sender has gone by then: that is how networks are late.

    Args:
        name: what it is called in reports.
        targets: where connections lead; one that refuses is passed over.
        loop: runs the connections.

    """

    def __init__(
        self, name: str, targets: Sequence[Target], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.name = name
        self.port = free_port()
        self._targets = list(targets)
        self._loop = loop
        self._weather = FAIR
        #: Set and replaced at each change of the weather.
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def lead_to(self, targets: Sequence[Target]) -> None:
        """Lead new connections elsewhere, and cut those that are there."""

        async def change() -> None:
            self._targets = list(targets)
            self._reset()

        _wait(self._loop, change())

    def set_weather(self, weather: Weather) -> None:
        """Treat what passes from now on like this; `FAIR` heals."""
        _wait(self._loop, self._set(weather))

    def heal(self) -> None:
        """Deliver what was kept, and be an ordinary connection again."""
        self.set_weather(FAIR)

    def cut(self) -> None:
        """Reset every connection that is there; what is under way is lost."""

        async def reset() -> None:
            self._reset()

        _wait(self._loop, reset())

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._tasks)

    async def open(self) -> None:
        """Listen; in the loop's thread."""
        # Each start makes a new socket on the same port.
        self._server = await asyncio.start_server(self._accept, LOOPBACK, self.port)

    async def close(self) -> None:
        """Refuse, and cut everything; in the loop's thread."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._reset()

    async def _set(self, weather: Weather) -> None:
        self._weather = weather
        if weather.is_refused:
            await self.close()
        elif self._server is None:
            await self.open()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _reset(self) -> None:
        for task in self._tasks:
            task.cancel()
        for writer in list(self._writers):
            _abort(writer)

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served by a task")
        self._tasks.add(task)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await self._carry(reader, writer)
        finally:
            self._tasks.discard(task)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        opened = [writer]
        self._writers.add(writer)
        try:
            target_reader, target_writer = await self._connect()
            opened.append(target_writer)
            self._writers.add(target_writer)
            requests = self._pump(
                reader, target_writer, lambda: self._weather.are_requests_stalled
            )
            answers = self._pump(
                target_reader, writer, lambda: self._weather.are_answers_stalled
            )
            # Both to their own end: what a stall keeps is delivered late.
            await asyncio.gather(requests, answers, return_exceptions=True)
        except OSError:
            _abort(writer)
        finally:
            for each in opened:
                self._writers.discard(each)
                each.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to a target.

        Raises:
            OSError: none of them accepts.

        """
        targets = random.sample(self._targets, k=len(self._targets))
        for host, port in targets:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    return await asyncio.open_connection(host, port)
        raise ConnectionRefusedError(f"{self.name}: no target accepts")

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        is_stalled: Callable[[], bool],
    ) -> None:
        """Carry one direction to its end, and then end it on the other side, too."""
        try:
            while chunk := await reader.read(_CHUNK_BYTES):
                if self._weather.delay_s:
                    await asyncio.sleep(self._weather.delay_s)
                while is_stalled():
                    await self._changed.wait()
                writer.write(chunk)
                await writer.drain()
        finally:
            # Neither HTTP nor MySQL half-closes: an end is the end of both.
            writer.close()


def _abort(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _wait(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(_TIMEOUT_S)


class TcpProxy:
    """All links of a run, carried by one thread; a context manager."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="tcp-proxy", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        _wait(self._loop, self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_TIMEOUT_S)
        self._loop.close()

    def link(self, name: str, *targets: Target) -> Link:
        """Listen on a port of its own, which leads to these targets.

        Raises:
            OSError: the port was taken in this very moment.

        """
        link = Link(name, targets, self._loop)
        _wait(self._loop, link.open())
        self.links[name] = link
        return link

    async def _close(self) -> None:
        for link in self.links.values():
            await link.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
