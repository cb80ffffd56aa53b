"""A bell is heard by who waits for it, once, and by nobody else."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from plugin_substrate.bell import Bell, keep_bell, take_bell
from plugin_substrate.home_loop import HomeLoop


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def in_a_thread(work: Any) -> Any:
    values: list[Any] = []
    thread = threading.Thread(target=lambda: values.append(work()))
    thread.start()
    thread.join()
    return values[0]


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_it_is_heard_whether_it_is_rung_before_or_after_who_waits() -> None:
    def wait() -> str:
        bell = take_bell()
        bell.ring()
        bell.wait()
        ringing = threading.Timer(0.001, bell.ring)
        ringing.start()
        bell.wait()
        ringing.join()
        return "heard"

    assert in_a_thread(wait) == "heard"
    with no_descriptors_left():
        assert wait() == "heard"


def test_a_thread_keeps_its_bell_and_takes_its_descriptors_with_it() -> None:
    def use() -> tuple[bool, bool]:
        first = take_bell()
        second = take_bell()
        keep_bell(first)
        return take_bell() is first, second is first

    before = descriptors()
    assert in_a_thread(use) == (True, False)
    assert descriptors() == before


def test_what_was_rung_for_one_who_was_interrupted_is_not_heard_by_the_next() -> None:
    rung: list[Bell] = []

    def wait() -> bool:
        late = take_bell()
        rung.append(late)
        late.ring()  # and nobody waits for it any more
        return take_bell() is late

    assert in_a_thread(wait) is False


def test_a_forked_process_rings_nobody_here() -> None:
    bell = take_bell()
    keep_bell(bell)
    child = os.fork()
    if not child:
        os._exit(0 if take_bell() is not bell else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert take_bell() is bell


def test_a_signal_handler_may_hand_work_over_while_its_thread_waits_for_other_work() -> None:
    home, begun, may_end = HomeLoop(), threading.Event(), threading.Event()
    heard: list[str] = []

    async def inner() -> str:
        return "inner"

    async def outer() -> str:
        begun.set()
        while not may_end.is_set():  # noqa: ASYNC110 - the handler is in another thread
            await asyncio.sleep(0.001)
        return "outer"

    def handle(signum: int, frame: FrameType | None) -> None:
        heard.append(home.run(inner))
        may_end.set()

    def interrupt() -> None:
        assert begun.wait(30)
        signal.pthread_kill(main, signal.SIGUSR1)

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert home.run(outer) == "outer"
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.join()
        home.release()
    assert heard == ["inner"]
