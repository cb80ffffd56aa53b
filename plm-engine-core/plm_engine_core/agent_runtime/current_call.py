"""The call that a governed function is making: which run records it, and whether it is to stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import UUID

from plm_engine_core.agent_runtime.hold import Hold
from plm_engine_core.control_plane.errors import ControlPlaneError

_CURRENT: ContextVar[CurrentCall] = ContextVar("plm_current_call")


class CallStopped(ControlPlaneError):
    """A call was stopped in its middle, by a halt, a cancel, or because somebody else has its run by now.

    Nobody knows what it did until then, so its outcome is recorded as unknown. `run_id` names the run that waits.
    """

    code = "call_stopped"

    def __init__(self, message: str, *, run_id: UUID) -> None:
        super().__init__(f"{message}; what the call did until then is not known: reconcile run {run_id}")
        self.run_id = run_id


class CurrentCall:
    """One call in progress; any thread may ask it.

    `stopping` is why the call is to stop, empty while it is not. A halt or a cancel is heard of with the next renewal
    of the call's lease: after a third of the governor's `lease_seconds`, and ten seconds, at the latest.
    """

    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        self._stopping = ""

    @property
    def stopping(self) -> str:
        """Why the call is to stop; empty while it may go on."""
        return self._stopping

    def check(self) -> None:
        """Go on, or stop here.

        Raises:
            CallStopped: the call is to stop. Left to pass, it leaves the outcome unknown; a function that knows better
                cleans up, and returns or raises an error of its own.
        """
        if self._stopping:
            raise CallStopped(self._stopping, run_id=self.run_id)


class CallInProgress(CurrentCall):
    """The same for who makes the call and has to stop it."""

    def __init__(self, run_id: UUID) -> None:
        super().__init__(run_id)
        self._lock = threading.Lock()
        self._listener: Callable[[], object] | None = None

    def stop(self, why: str) -> None:
        """Have the call stop; the first reason counts."""
        with self._lock:
            if self._stopping:
                return
            self._stopping, listener = why, self._listener
        if listener is not None:
            listener()

    def listen(self, listener: Callable[[], object]) -> None:
        """Have `listener` called once the call is to stop, in the thread that says so; at once where it was said."""
        with self._lock:
            self._listener = listener
            said = bool(self._stopping)
        if said:
            listener()


def current_call() -> CurrentCall:
    """The call that the governed function is making from whose body, in its own thread or task, this is asked.

    Raises:
        LookupError: no governed function is being called here.
    """
    try:
        return _CURRENT.get()
    except LookupError:
        raise LookupError("no governed function is being called here; ask in the body of one") from None


@contextmanager
def calling(call: CurrentCall) -> Iterator[None]:
    """Make `call` the current one while the function runs."""
    token = _CURRENT.set(call)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def stoppable(call: CallInProgress) -> Iterator[None]:
    """Cancel the task that runs the block once the call is to stop, and raise `CallStopped` where that ended it.

    Done as `asyncio.timeout` does it, so that a cancel of the caller's own stays one.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101  # a coroutine runs in one
    before, running, cancelled = task.cancelling(), True, False

    def cancel() -> None:
        nonlocal cancelled
        if running:
            cancelled = True
            task.cancel()

    call.listen(lambda: loop.call_soon_threadsafe(cancel))
    try:
        with calling(call):
            yield
    except asyncio.CancelledError:
        if cancelled and task.uncancel() <= before:
            raise CallStopped(call.stopping, run_id=call.run_id) from None
        raise
    else:
        if cancelled:  # the function would not be stopped
            task.uncancel()
    finally:
        running = False


async def pass_on(hold: Hold, call: CallInProgress) -> None:
    """Stop the call when what holds its lease hears of a reason."""
    await hold.stop.wait()
    if hold.halt is not None:
        call.stop(f"a {hold.halt['scope']} halt stands: {hold.halt['reason']}")
    else:
        call.stop("its lease was lost" if hold.lost else "its run was cancelled")
