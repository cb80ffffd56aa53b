"""Who follows events: each reads on from the store when it hears that there is news, so one that is slow loses none."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable

from plugin_substrate.errors import StoreError
from plugin_substrate.queue.job import JobEvent

_PAGE = 200

EVERYTHING = ""
"""The key of those who follow all events; the others are ids of jobs and of sequences."""

Read = Callable[[int, int], list[JobEvent]]


class Following:
    """Those who follow, by what they follow."""

    def __init__(self) -> None:
        self._followers: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._failure: StoreError | None = None

    async def events(
        self, key: str, after: int, read: Read, ended: Callable[[], bool], *, by_position: bool
    ) -> AsyncIterator[JobEvent]:
        """Yield what ``read(after, limit)`` gives, now and on news, until ``ended()``; a `StoreError` after `fail`."""
        news = asyncio.Event()
        self._followers[key].add(news)
        try:
            while True:
                news.clear()
                over = ended()  # asked before reading: what happened up to the end is then read
                while page := read(after, _PAGE):
                    for event in page:
                        after = event.position if by_position else event.number
                        yield event
                if over:
                    return
                if self._failure is not None:
                    raise self._failure
                await news.wait()
        finally:
            self._followers[key].discard(news)
            if not self._followers[key]:
                del self._followers[key]

    def tell(self, events: Iterable[JobEvent]) -> None:
        """Tell those whom events concern that they can be read."""
        if not self._followers:
            return
        told = {key for event in events for key in (EVERYTHING, event.job_id, event.sequence_id) if key is not None}
        for key in told:
            for news in self._followers.get(key, ()):
                news.set()

    def fail(self, failure: StoreError) -> None:
        """Tell everybody that there will be no more."""
        self._failure = failure
        for followers in self._followers.values():
            for news in followers:
                news.set()
