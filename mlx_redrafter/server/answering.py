"""Between the engine thread and a client: events come over, and a client that leaves ends a job."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_redrafter.server.events import Event, Failed, Finished, Gathered, Progress
from mlx_redrafter.server.problems import Problem
from mlx_redrafter.server.wire.dialect import Dialect

Item = tuple[int, Event]
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy shall not collect the pieces
}


class Mailbox:
    """What the engine thread delivers to a handler on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()

    def deliver(self, row: int, event: Event) -> None:
        """In the engine thread; RuntimeError if the loop has ended."""
        self._loop.call_soon_threadsafe(self._put, (row, event))

    def _put(self, item: Item) -> None:
        self._items.append(item)
        self._arrived.set()

    async def next(self, seconds: float | None = None) -> Item | None:
        """The next event; None where none came in time."""
        while not self._items:
            self._arrived.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        return self._items.popleft()


async def pieces(
    box: Mailbox, dialect: Dialect, rows: int, keep_alive: float, note: Callable[[int, Event], None]
) -> AsyncIterator[bytes]:
    """A stream of ``rows`` answers, on the wire of a dialect; ``note`` sees every event."""
    for piece in dialect.opening():
        yield piece
    progress: Progress | None = None
    clock = asyncio.get_running_loop().time
    told = clock()  # when the client last heard anything: not every event is told
    while rows:
        item = await box.next(max(0.0, told + keep_alive - clock()))
        sent: list[bytes] = []
        if item is not None:
            row, event = item
            note(row, event)
            if isinstance(event, Failed):
                for piece in dialect.failed(event.wrong):
                    yield piece
                return
            progress = event if isinstance(event, Progress) else None
            rows -= isinstance(event, Finished)
            sent = dialect.event(row, event)
        if not sent and clock() >= told + keep_alive:
            sent = [dialect.waiting(progress)]
        for piece in sent:
            yield piece
        told = clock() if sent else told
    for piece in dialect.closing():
        yield piece


async def gathered(box: Mailbox, rows: int, note: Callable[[int, Event], None]) -> list[Gathered]:
    """All of so many answers. Raises Problem."""
    answers, left = [Gathered() for _ in range(rows)], rows
    while left:
        item = await box.next()
        assert item is not None, "without a limit of time an event comes"
        row, event = item
        note(row, event)
        if isinstance(event, Failed):
            raise Problem(**vars(event.wrong))
        answers[row].take(event)
        left -= isinstance(event, Finished)
    return answers


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends pieces as they come, until they end or the client leaves.

    Args:
        content: the pieces.
        end: called at the end, whatever brought it.
        write_seconds: for a client to take a piece.
    """

    def __init__(
        self, content: AsyncIterator[bytes], end: Callable[[], None], write_seconds: float
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self.content, self.end, self.write_seconds = content, end, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        tasks = [asyncio.ensure_future(self._write(send)), asyncio.ensure_future(gone(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.end()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for piece in self.content:
            async with asyncio.timeout(self.write_seconds):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
