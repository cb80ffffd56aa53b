"""The control plane for callers without an event loop: the same core, driven by a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.loop_thread import LoopThread

P = ParamSpec("P")
T = TypeVar("T")


def _waiting(
    method: Callable[Concatenate[ControlPlane, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncControlPlane, P], T]:
    """The same method for callers that wait; signature and documentation are those of the original."""

    @functools.wraps(method)
    def call(self: SyncControlPlane, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.call(lambda core: method(core, *args, **kwargs))

    return call


class SyncControlPlane:
    """`ControlPlane` for synchronous callers, from any number of threads; use it in a `with` block.

    `opened` is a control plane, or a context manager that opens one on the private loop and closes it in the end, as a
    database pool needs. Everything a method raises is what the core raised.

    Raises:
        RuntimeError: a method is called where an event loop runs, after `close`, or in a forked process; or after
            `opened` had raised, once, what its first callers were told.
    """

    def __init__(self, opened: ControlPlane | AbstractAsyncContextManager[ControlPlane]) -> None:
        self._opened = opened
        self._opening: asyncio.Task[ControlPlane] | None = None
        self._exits = AsyncExitStack()
        self._thread = LoopThread("SyncControlPlane")

    activate_policy = _waiting(ControlPlane.activate_policy)
    reload = _waiting(ControlPlane.reload)
    create_run = _waiting(ControlPlane.create_run)
    delegate = _waiting(ControlPlane.delegate)
    admit = _waiting(ControlPlane.admit)
    ask = _waiting(ControlPlane.ask)
    begin = _waiting(ControlPlane.begin)
    settle = _waiting(ControlPlane.settle)
    close_abandoned = _waiting(ControlPlane.close_abandoned)
    finish = _waiting(ControlPlane.finish)
    cancel = _waiting(ControlPlane.cancel)
    mark = _waiting(ControlPlane.mark)
    decide = _waiting(ControlPlane.decide)
    provide_input = _waiting(ControlPlane.provide_input)
    acquire_lease = _waiting(ControlPlane.acquire_lease)
    renew_lease = _waiting(ControlPlane.renew_lease)
    release_lease = _waiting(ControlPlane.release_lease)
    require_lease = _waiting(ControlPlane.require_lease)
    set_budget = _waiting(ControlPlane.set_budget)
    correct_budget = _waiting(ControlPlane.correct_budget)
    halt = _waiting(ControlPlane.halt)
    drill = _waiting(ControlPlane.drill)
    lift = _waiting(ControlPlane.lift)
    registered_agents = _waiting(ControlPlane.registered_agents)
    set_agent_status = _waiting(ControlPlane.set_agent_status)
    why = _waiting(ControlPlane.why)
    feed = _waiting(ControlPlane.feed)
    as_of = _waiting(ControlPlane.as_of)
    verify_events = _waiting(ControlPlane.verify_events)

    def call(self, work: Callable[[ControlPlane], Coroutine[Any, Any, T]]) -> T:
        """Wait for whatever `work` does with the core, for what has no method here, such as reading a run."""
        return self._thread.run(lambda: self.on_core(work))

    async def on_core(self, work: Callable[[ControlPlane], Coroutine[Any, Any, T]]) -> T:
        """The coroutine behind `call`; it belongs on the private loop."""
        return await work(await self._entered())

    @property
    def thread(self) -> LoopThread:
        """The private loop, for faces that are built on this one."""
        return self._thread

    async def _entered(self) -> ControlPlane:
        if isinstance(self._opened, ControlPlane):
            return self._opened
        if self._opening is None:  # in a task of its own: whoever comes first may be interrupted meanwhile
            self._opening = asyncio.create_task(self._enter(self._opened))
        elif self._opening.done() and (error := self._opening.exception()) is not None:
            raise RuntimeError(f"SyncControlPlane could not be opened; make a new one: {error}") from error
        return await asyncio.shield(self._opening)

    async def _enter(self, opened: AbstractAsyncContextManager[ControlPlane]) -> ControlPlane:
        try:
            return await self._exits.enter_async_context(opened)
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:  # out of a task it would end the loop, and with it every caller
            raise RuntimeError(f"opening the control plane was left with {error!r}") from error

    async def _leave(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await self._exits.aclose()

    def close(self) -> None:
        """Close what was opened and end the private loop; calls under way in other threads are taken back."""
        self._thread.close(self._leave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        thread = getattr(self, "_thread", None)
        if thread is not None and thread.abandon() and self._opening is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
