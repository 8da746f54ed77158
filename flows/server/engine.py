"""One thread decodes for everyone: requests that arrive while others run join the batch at the next step.

The HTTP side lives in an event loop. A call submits its requests and iterates over what comes; if it stops listening,
its rows leave the batch. An error in the thread reaches every caller, and ends the engine: nothing is retried here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from infra.errors import FathomError
from model.batch import Batch, CacheDtype, Request, Row
from model.generate import Piece
from model.transformer import Transformer


class EngineFailed(FathomError):
    """The decoding thread died; the server's log says of what."""

    exit_code = 8


@dataclass(eq=False)
class _Ticket:
    number: int
    request: Request
    give: Callable[[Piece | EngineFailed], None]  # to the caller, from the engine's thread
    row: Row | None = None
    given: int = 0
    cancelled: bool = False


class Engine:
    """Decodes at most `max_batch` requests at a time, the others in the order of their arrival."""

    def __init__(
        self,
        model: Transformer,
        max_batch: int = 64,
        speculate: bool = False,
        cache_dtype: CacheDtype | None = None,
    ) -> None:
        self.model, self.max_batch, self.speculate = model, max_batch, speculate
        self._batch = Batch(model, speculate, cache_dtype)
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._running: list[_Ticket] = []
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread after the step it is in. What runs is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, requests: Sequence[Request]) -> Replies:
        """Queue the requests of one call; iterate over what is returned, in the event loop that called."""
        replies = Replies(self, requests)
        with self._changed:
            if self._failure is not None:
                raise EngineFailed(f"the engine has died: {self._failure!r}")
            self._waiting += replies.tickets
            self._changed.notify()
        return replies

    def _work(self) -> None:
        try:
            while (joining := self._next()) is not None:
                if joining:
                    self._running += joining  # before anything can fail: they are told of it like all others
                    rows = self._batch.admit([ticket.request for ticket in joining])
                    for ticket, row in zip(joining, rows, strict=True):
                        ticket.row = row
                elif self._batch.n_going:
                    self._batch.step()
                self._deliver()
        except BaseException as error:
            with self._changed:
                self._failure = error
                lost = [*self._running, *self._waiting]
            for ticket in lost:
                ticket.give(EngineFailed(f"the engine has died: {error!r}"))
            raise

    def _next(self) -> list[_Ticket] | None:
        """Whoever may join now; waits while there is nothing to do at all. None: the end."""
        with self._changed:
            while not (self._waiting or self._running or self._closing):
                self._changed.wait()
            if self._closing:
                return None
            self._waiting = [ticket for ticket in self._waiting if not ticket.cancelled]
            for ticket in self._running:
                if ticket.cancelled and ticket.row is not None:
                    ticket.row.done = True
            room = self.max_batch - self._batch.n_going
            joining, self._waiting = self._waiting[:room], self._waiting[room:]
            return joining

    def _deliver(self) -> None:
        for ticket in self._running:
            row = ticket.row
            assert row is not None
            if not ticket.cancelled:
                ticket.give(Piece.of(row, ticket.number, ticket.given))
            ticket.given = len(row.tokens)
        self._running = [ticket for ticket in self._running if ticket.row is not None and not ticket.row.done]


class Replies:
    """The pieces of one call's requests, as they come; ends when all are done or cancelled."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Piece | EngineFailed]()

        def give(piece: Piece | EngineFailed) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, piece)

        self.tickets = [_Ticket(number, request, give) for number, request in enumerate(requests)]
        self._open = set(range(len(requests)))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while self._open:
            piece = await self._queue.get()
            if isinstance(piece, EngineFailed):
                raise piece
            if piece.number in self._open:
                if piece.done:
                    self._open.discard(piece.number)
                return piece
        raise StopAsyncIteration

    def cancel(self, number: int) -> None:
        """No more of this one: it leaves the batch."""
        self.tickets[number].cancelled = True
        self._open.discard(number)

    def close(self) -> None:
        for number in list(self._open):
            self.cancel(number)
