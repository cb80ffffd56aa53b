"""Asks evaluators side by side: each has its time, and the first denial that settles the matter ends the waiting."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from plm_engine_core.control_plane.admission.evaluators.evaluator import Evaluator, EvaluatorResult, Examined
from plm_engine_core.control_plane.admission.evaluators.values import apart, kept_metadata
from plm_engine_core.control_plane.policy import Evaluation, Facts, Proposed
from plm_engine_core.control_plane.vocabulary import EvaluationStatus

logger = logging.getLogger(__name__)

MOST_THREADS = 32
_LONGEST_REASON = 500

_Ask = Callable[[Evaluator], tuple[Callable[..., Any], tuple[Any, ...]]]
"""The method of an evaluator that is called, and with what."""


@dataclass(frozen=True, kw_only=True)
class Configured:
    """One evaluator of a policy. A `gate` that does not allow settles the matter."""

    name: str
    evaluator: Evaluator
    gate: bool
    timeout_seconds: float


class ParallelPolicyEvaluator:
    """The evaluators of one policy, ready to be asked. Keeps nothing between proposals but its threads' number.

    Any number of event loops may ask; each has `MOST_THREADS` threads.
    """

    def __init__(self, evaluators: Sequence[Configured]) -> None:
        self._evaluators: Mapping[str, Configured] = {each.name: each for each in evaluators}
        self._threads: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._left_behind: set[asyncio.Task[Any]] = set()

    async def evaluate_all(self, names: Sequence[str], proposal: Proposed, facts: Facts) -> tuple[Evaluation, ...]:
        """Ask these evaluators about a proposal.

        The answers come in the order of `names`, none is missing, and none is raised.

        Answers when all have answered or run out of time, or at once when a gate did not allow; what still runs then is
        cancelled. A plain function cannot be stopped: its thread is left to end, and its answer is dropped.
        """
        return await self._all(names, lambda each: (each.evaluate, (proposal, facts)), told=True)

    async def examine_all(self, names: Sequence[str], examined: Examined) -> tuple[Evaluation, ...]:
        """Ask these evaluators in another phase, in the same way.

        Each is shown a copy of its own, so that what one changes is hidden from no other, and recorded nowhere. Of an
        evaluator that raises only the type of its error is kept: its text may repeat what was examined.

        Raises:
            InvalidRequest: the document holds what is no JSON; names the path.
        """
        document = _apart(examined.document)  # its holder may change it while they are asked
        return await self._all(
            names, lambda each: (_examination(each), (replace(examined, document=_apart(document)),)), told=False
        )

    async def _all(self, names: Sequence[str], ask: _Ask, *, told: bool) -> tuple[Evaluation, ...]:
        loop = asyncio.get_running_loop()
        chosen = [self._evaluators.get(name) for name in names]
        answers: dict[str, Evaluation] = {}
        running: dict[asyncio.Task[Any], tuple[Configured, float]] = {}
        for name, each in zip(names, chosen, strict=True):
            if each is None:
                answers[name] = _evaluation(name, EvaluationStatus.FAILED, "it is not configured")
            else:
                task = asyncio.ensure_future(self._ask(each.evaluator, ask))
                running[task] = (each, loop.time() + each.timeout_seconds)
        settled = any(each is None for each in chosen)
        try:
            while running and not settled:
                soonest = min(deadline for _, deadline in running.values())
                await asyncio.wait(
                    running, timeout=max(0.0, soonest - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
                settled = self._collect(running, answers, loop.time(), told=told)
        finally:
            for task in running:
                self._leave(task)
        return tuple(
            answers.get(name) or _evaluation(name, EvaluationStatus.CANCELLED, "another evaluator did not allow")
            for name in names
        )

    def _collect(
        self,
        running: dict[asyncio.Task[Any], tuple[Configured, float]],
        answers: dict[str, Evaluation],
        now: float,
        *,
        told: bool,
    ) -> bool:
        """Take over what is done or late; answers whether a gate did not allow."""
        settled = False
        for task, (each, deadline) in list(running.items()):
            if task.done():
                answer = _outcome(each.name, task, told=told)
            elif now >= deadline:
                words = f"no answer within {each.timeout_seconds:g} s"
                answer = _evaluation(each.name, EvaluationStatus.TIMED_OUT, words)
                self._leave(task)
            else:
                continue
            del running[task]
            answers[each.name] = answer
            settled = settled or (each.gate and answer.status is not EvaluationStatus.ALLOWED)
        return settled

    async def _ask(self, evaluator: Evaluator, ask: _Ask) -> Any:
        function, arguments = ask(evaluator)
        if inspect.iscoroutinefunction(function):
            return await _contained(function(*arguments))
        answer = await self._in_thread(evaluator.kind, function, arguments)
        return await _contained(answer) if isinstance(answer, Awaitable) else answer

    async def _in_thread(self, kind: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Run a plain function in a daemon thread, which no shutdown waits for; it keeps its place until it ends."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        # Once somebody waited at it, a semaphore is of use to its own event loop only.
        threads = self._threads.setdefault(loop, asyncio.Semaphore(MOST_THREADS))
        await threads.acquire()
        answer: list[Any] = []
        failure: list[BaseException] = []

        def finish() -> None:
            threads.release()
            done.set()

        def work() -> None:
            try:
                answer.append(function(*arguments))
            except BaseException as error:  # noqa: BLE001  # handed to whoever awaits it
                failure.append(error)
            try:
                loop.call_soon_threadsafe(finish)
            except RuntimeError:
                logger.debug("an evaluator ended after the event loop that had asked it")  # whose answer stands

        try:
            threading.Thread(target=work, name=f"evaluator-{kind}", daemon=True).start()
        except RuntimeError:  # the machine has no thread left
            threads.release()
            raise
        await done.wait()
        if failure:
            raise RuntimeError(f"{type(failure[0]).__name__}: {_words(failure[0])}") from failure[0]
        return answer[0]

    def _leave(self, task: asyncio.Task[Any]) -> None:
        """Cancel without waiting; a task that will not end is kept from being collected, and its failure is read."""
        if task.done():
            _ = task.cancelled() or task.exception()
            return
        self._left_behind.add(task)
        task.add_done_callback(self._left_behind.discard)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        task.cancel()


async def _contained(answer: Awaitable[Any]) -> Any:
    """The answer; a `sys.exit` on the way to it would end the event loop, and the process with it."""
    try:
        return await answer
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error


def _apart(document: Mapping[str, Any]) -> dict[str, Any]:
    return {root: apart(value, root=root) for root, value in document.items()}


def _examination(evaluator: Evaluator) -> Callable[..., Any]:
    examine: Callable[..., Any] = getattr(evaluator, "examine")  # noqa: B009  # not every evaluator has it; those here do
    return examine


def _outcome(name: str, task: asyncio.Task[Any], *, told: bool) -> Evaluation:
    if task.cancelled():
        return _evaluation(name, EvaluationStatus.FAILED, "it cancelled itself")
    error = task.exception()
    if error is not None:
        if told:
            logger.warning("the evaluator %s failed", name, exc_info=error)
            return _evaluation(name, EvaluationStatus.FAILED, f"{type(error).__name__}: {_words(error)}")
        cause = error.__cause__ or error
        place = "".join(traceback.format_tb(cause.__traceback__))
        logger.warning("the evaluator %s failed with %s\n%s", name, type(cause).__name__, place)
        return _evaluation(name, EvaluationStatus.FAILED, type(cause).__name__)
    result = task.result()
    try:
        return _answer(name, result)
    except Exception as problem:  # noqa: BLE001  # an evaluator's own object, or one that it still changes
        words = f"its answer cannot be read ({type(problem).__name__})"
        return _evaluation(name, EvaluationStatus.INVALID, words)


def _answer(name: str, result: Any) -> Evaluation:
    if not isinstance(result, EvaluatorResult):
        return _evaluation(name, EvaluationStatus.INVALID, f"it answered with {type(result).__name__}")
    allow, reason, metadata = (getattr(result, name) for name in ("allow", "reason", "metadata"))  # each read once
    if not isinstance(allow, bool):
        return _evaluation(name, EvaluationStatus.INVALID, f"it answered with {type(result).__name__}")
    try:
        kept = kept_metadata(metadata)
    except ValueError as problem:
        return _evaluation(name, EvaluationStatus.INVALID, problem)
    status = EvaluationStatus.ALLOWED if allow else EvaluationStatus.DENIED
    return _evaluation(name, status, reason, metadata=kept)


def _evaluation(
    name: str, status: EvaluationStatus, reason: object, *, metadata: Mapping[str, Any] | None = None
) -> Evaluation:
    """With a reason that can be stored, whatever the evaluator put into it."""
    text = _words(reason)[:_LONGEST_REASON].encode(errors="backslashreplace").decode().replace("\x00", "\\x00")
    return Evaluation(name=name, status=status, reason=text, metadata=metadata or {})


def _words(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001  # an evaluator's own object
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
