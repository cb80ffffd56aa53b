"""A control plane that is closed while governed calls are opened and recorded leaves none of them in doubt."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from plm_engine_core import Governor, governed
from plm_engine_core.control_plane import loop_thread
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.loop_thread import LoopThread
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.vocabulary import RunState, StepState

WAIT = 60  # seconds, a bound for what ends at once


@pytest.fixture
def storage():
    return MemoryStorage()


@pytest.fixture
def governor(storage, monkeypatch):
    """A governor of which a test hears, by `closing`, that it is being closed."""
    governor = Governor.in_memory({"shop.pay": "read"}, storage=storage)
    close, governor.closing = governor.plane.thread.close, threading.Event()

    def told(last):
        governor.closing.set()
        close(last)

    monkeypatch.setattr(governor.plane.thread, "close", told)
    with governor:
        yield governor


@pytest.fixture(params=["asked", "answered"])
def slow_admission(request, governor, storage, monkeypatch):
    """An admission that goes on when the governor is being closed; what it calls when it is asked, or has answered."""
    admit, meanwhile = storage.admission.admit, []

    async def slow(*args, **keywords):
        answer = await admit(*args, **keywords) if request.param == "answered" else None
        meanwhile[0]()
        await asyncio.to_thread(governor.closing.wait, WAIT)
        return answer or await admit(*args, **keywords)

    monkeypatch.setattr(storage.admission, "admit", slow)
    return meanwhile


async def only_run(storage, governor):
    (run,) = await storage.runs.list(governor.tenant_id, limit=9, before=None, state=None)
    (step,) = await storage.runs.steps(governor.tenant_id, run.id)
    return run.state, step.state


def test_an_interrupt_that_closes_it_before_a_call_is_made_leaves_nothing_open(governor, storage, slow_admission):
    main = threading.get_ident()
    slow_admission.append(lambda: signal.pthread_kill(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), governor:
        governed("shop.pay", by=governor)(lambda: pytest.fail("it ran"))()
    assert asyncio.run(only_run(storage, governor)) == (RunState.FAILED, StepState.NOT_STARTED)


async def test_who_stops_waiting_and_closes_it_leaves_nothing_open(governor, storage, slow_admission):
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    slow_admission.append(lambda: loop.call_soon_threadsafe(asked.set))

    @governed("shop.pay", by=governor)
    async def pay():
        raise AssertionError("it ran")

    task = asyncio.create_task(pay())
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(governor.close)
    assert await only_run(storage, governor) == (RunState.FAILED, StepState.NOT_STARTED)


def test_closing_in_another_thread_makes_no_call_of_one_that_is_being_opened(governor, storage, slow_admission):
    asked = threading.Event()
    slow_admission.append(asked.set)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(governed("shop.pay", by=governor)(lambda: pytest.fail("it ran")))
        assert asked.wait(WAIT)
        governor.close()
        with pytest.raises(RuntimeError, match="was closed while this call was under way"):
            waiting.result(WAIT)
    assert asyncio.run(only_run(storage, governor)) == (RunState.FAILED, StepState.NOT_STARTED)


def test_what_an_answer_leaves_to_do_is_done_while_it_is_closed_too():
    """The answer was given before, and its caller is interrupted before it hears it, when closing has begun."""
    begun, go_on, left_to_do = threading.Event(), threading.Event(), []

    class Interrupted(LoopThread):
        def submit(self, work):
            submitted = super().submit(work)
            if threading.current_thread() is threading.main_thread():
                submitted.result(WAIT)
                closing.append(threads.submit(self.close))
                with pytest.raises(RuntimeError, match="was closed while"):
                    other.result(WAIT)
                raise KeyboardInterrupt
            return submitted

    async def slow():
        begun.set()
        await asyncio.to_thread(go_on.wait, WAIT)

    async def answer():
        return 7

    async def unheard(result):
        if result is not None:
            left_to_do.append(result)

    thread, closing = Interrupted("a thread"), []
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(thread.run, slow, unheard=unheard)
        assert begun.wait(WAIT)
        with pytest.raises(KeyboardInterrupt):
            thread.run(answer, unheard=unheard)
        go_on.set()
        closing[0].result(WAIT)
    assert left_to_do == [7]


@pytest.mark.parametrize("error", [StorageUnavailable("no database"), SystemExit(3)])
@pytest.mark.parametrize("fails", ["work", "unheard"])
def test_a_failure_that_nobody_is_told_is_logged_and_ends_nothing(fails, error, caplog):
    main, interrupted = threading.get_ident(), threading.Event()

    async def work():
        signal.pthread_kill(main, signal.SIGINT)
        await asyncio.to_thread(interrupted.wait, WAIT)
        if fails == "work":
            raise error

    async def unheard(result):
        raise error

    async def nothing():
        """The thread still runs."""

    thread = LoopThread("a thread")
    with pytest.raises(KeyboardInterrupt):
        thread.run(work, unheard=unheard)
    interrupted.set()
    thread.run(nothing)
    thread.close()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.exc_info[1] is error


def test_what_does_not_end_is_cancelled_in_the_end_and_said(monkeypatch, caplog):
    monkeypatch.setattr(loop_thread, "_TIME_TO_FINISH", 0.0)
    begun, cancelled = threading.Event(), threading.Event()

    async def endless():
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    async def unheard(result):
        """Never called."""

    thread = LoopThread("a thread")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(thread.run, endless, unheard=unheard)
        assert begun.wait(WAIT)
        thread.close()
        assert cancelled.is_set()
        with pytest.raises(RuntimeError, match="was closed while"):
            waiting.result(WAIT)
    assert "calls of it that were not finished: 1" in caplog.text
