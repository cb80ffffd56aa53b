"""Functions of this process under control: each call is proposed, decided, paid for and recorded."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from plm_shared.canonical_json import storable_json

from plm_engine_core.agent_runtime.current_call import CallStopped, calling, stoppable
from plm_engine_core.agent_runtime.governed_calls import GovernedCalls, Opened
from plm_engine_core.agent_runtime.governor import Governor
from plm_engine_core.agent_runtime.refusals import CallPending, OutputWithheld, resumable
from plm_engine_core.control_plane.admission.proposal import content_hash
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.vocabulary import Evidence, OutcomeStatus

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST = 2000  # characters of an error's text that are recorded


class OutcomeUnknown(Exception):  # it reads as what it says
    """Raised by a governed function that cannot know whether its effect happened; its run then waits for a human."""


def governed(
    capability: str, *, by: Governor, resource: str = "", leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Put a function, synchronous or not, under the control of `by`.

    A call proposes `capability` with the function's arguments, which have to be JSON values; those named in `leave_out`
    (a client, `self`) are not part of the proposal, so no approval covers them. `resource` names what is touched, and
    may hold arguments, as in `"order/{number}"`.

    What the function returns is returned, and recorded where it is JSON, with the evidence `reported`: nobody but the
    function says so. What it raises is recorded as a failure and raised; where it is interrupted, its outcome is
    unknown. Where an evaluator does not let that be kept, the caller is not given it either, but told `OutputWithheld`;
    what is no JSON, or a message of over 2 000 characters, no evaluator can be asked about, and so none allows it.

    A halt, or a cancel of its run, cancels an asynchronous function that is being called, as the task that awaits it
    would be. A synchronous one cannot be ended from outside: it asks `current_call()` now and then.

    Raises:
        InvalidRequest: from here, the capability is not registered, `leave_out` names no argument, or the function
            yields and so would go on after its call; from a call, an argument is no JSON value or was changed while it
            was decided on, or the result has not run yet.
        CallRefused: from a call; it was denied or steered, or waits for a human. The function did not run.
        InputRefused: from a call; an evaluator does not let its run be created. The function did not run.
        OutputWithheld: from a call; the function did run, and an evaluator does not let its caller have the result.
        CallStopped: from a call; it was stopped in its middle.
        StorageUnavailable: from a call; what became of it could not be recorded.
        RuntimeError: from a call of a synchronous function, where an event loop runs, which it would block.
    """
    calls = GovernedCalls(by)
    calls.require(capability)

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise _unfinished(name)
        signature = _signature(function, name, leave_out)
        shape = _Shape(signature, capability, resource or f"function/{name}", leave_out)
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return cast("Callable[P, T]", _asynchronous(calls, shape, function))
        return _synchronous(calls, shape, function)

    return decorate


@dataclass(frozen=True)
class _Shape:
    """What is proposed when a function is called."""

    signature: inspect.Signature
    capability: str
    resource: str
    leave_out: tuple[str, ...]

    def call(self, args: Any, kwargs: Any) -> tuple[str, dict[str, Any]]:
        """The resource and the arguments of one call, defaults included; TypeError as for the function itself."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name not in self.leave_out}
        try:
            return self.resource.format(**bound.arguments), _apart(arguments)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"resource {self.resource!r} cannot be filled in with the arguments: {error!r}", field="resource"
            ) from error

    def require_unchanged(self, args: Any, kwargs: Any, proposed: dict[str, Any]) -> None:
        """Refuse to call with other arguments than those that were decided on, which somebody changed meanwhile."""
        _, arguments = self.call(args, kwargs)
        if content_hash(arguments) != content_hash(proposed):
            raise InvalidRequest(
                f"the arguments of {self.resource} were changed while it was decided on them; it was not called",
                field="arguments",
            )


if sys.version_info >= (3, 14):
    from annotationlib import Format

    def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
        """Annotations stay as they are written: what they name may be defined only after the function is."""
        return inspect.signature(function, annotation_format=Format.FORWARDREF)

else:
    _signature_of = inspect.signature


def _signature(function: Callable[..., Any], name: str, leave_out: Sequence[str]) -> inspect.Signature:
    """What the function takes; InvalidRequest where nobody can tell, or where nothing of a name could be left out."""
    try:
        signature = _signature_of(function)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{name} does not say which arguments it takes: {error}", field="function") from error
    if isinstance(leave_out, str) or (unknown := [each for each in leave_out if each not in signature.parameters]):
        wrong = repr(leave_out) if isinstance(leave_out, str) else ", ".join(unknown)
        raise InvalidRequest(f"leave_out has to name arguments of {name}, in a tuple, not {wrong}", field="leave_out")
    return signature


def _apart(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, out of reach of who holds the caller's; of what cannot be copied admission says what it is."""
    try:
        return copy.deepcopy(arguments)
    except Exception:  # noqa: BLE001  # whatever an object makes of being copied
        return arguments


def _synchronous(calls: GovernedCalls, shape: _Shape, function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        resource, arguments = shape.call(args, kwargs)

        def make(ticket: CallPending | None) -> T:
            try:
                opening = _opening(calls, shape.capability, resource, arguments, ticket)
                opened = calls.wait(opening, unheard=calls.never_made)
            except CallPending as pending:
                raise resumable(pending, make) from None
            try:
                shape.require_unchanged(args, kwargs, arguments)
                with calling(opened.call):
                    result = _finished(shape, function(*args, **kwargs))
            except BaseException as error:
                outcome = failed(error)
                withheld = calls.wait(_closing(calls, opened, outcome, opaque=_is_cut(error)))
                if withheld is None or not _may_be_replaced(error):
                    raise
            else:
                outcome = reported(result)
                withheld = calls.wait(_closing(calls, opened, outcome, opaque=_is_no_json(result, outcome)))
                if withheld is None:
                    return result
                del result
            status = outcome.status
            del outcome
            # Out of the handler, and with nothing in its frame, so that it hands on nothing of what was withheld.
            raise OutputWithheld(withheld, run_id=opened.run.id, status=status)

        return make(None)

    return call


def _asynchronous(calls: GovernedCalls, shape: _Shape, function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        resource, arguments = shape.call(args, kwargs)

        async def make(ticket: CallPending | None) -> Any:
            try:
                opening = _opening(calls, shape.capability, resource, arguments, ticket)
                opened = await calls.away(opening, unheard=calls.never_made)
            except CallPending as pending:
                raise resumable(pending, make) from None
            try:
                shape.require_unchanged(args, kwargs, arguments)
                with stoppable(opened.call):
                    result = _finished(shape, await function(*args, **kwargs))
            except BaseException as error:
                outcome = failed(error)
                withheld = await calls.away(_closing(calls, opened, outcome, opaque=_is_cut(error)))
                if withheld is None or not _may_be_replaced(error):
                    raise
            else:
                outcome = reported(result)
                withheld = await calls.away(_closing(calls, opened, outcome, opaque=_is_no_json(result, outcome)))
                if withheld is None:
                    return result
                del result
            status = outcome.status
            del outcome
            raise OutputWithheld(withheld, run_id=opened.run.id, status=status)  # with no context, as above

        return await make(None)

    return call


def _finished(shape: _Shape, result: T) -> T:
    """The result, unless it is still to run: what it would do then, no halt could stop and no outcome tell."""
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result) or inspect.isgenerator(result):
            result.close()
        raise _unfinished(shape.resource)
    return result


def _unfinished(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name} would go on after its call is over; let it return what it yields", field="function")


def _opening(
    calls: GovernedCalls, capability: str, resource: str, arguments: dict[str, Any], ticket: CallPending | None
) -> Callable[[ControlPlane], Any]:
    if ticket is None:
        return lambda core: calls.open_call(core, capability, resource, arguments)
    return lambda core: calls.propose(core, ticket.run, capability, resource, arguments, ticket_id=ticket.ticket_id)


def _closing(calls: GovernedCalls, opened: Opened, outcome: Outcome, *, opaque: bool) -> Callable[[ControlPlane], Any]:
    return lambda core: calls.close_call(core, opened, outcome, opaque=opaque)


def _is_no_json(result: Any, outcome: Outcome) -> bool:
    """Whether the caller would be given more than the outcome says."""
    return outcome.output is None and result is not None


def _is_cut(error: BaseException) -> bool:
    """The same of an error: only the beginning of its message is recorded."""
    return len(_words(error)) > _LONGEST


def _may_be_replaced(error: BaseException) -> bool:
    """Whether the caller may be told something else; what ends a task or a process goes on as it is."""
    return isinstance(error, Exception) and not isinstance(error, CallStopped)


def reported(result: Any) -> Outcome:
    """What a function that returned says of itself; its cost is the whole reservation, as nobody measured it."""
    try:
        output = json.loads(storable_json(result, root="output"))  # apart from what the caller, or others, now change
    except Exception:  # noqa: BLE001  # it is no JSON; or an object of its own, or changed meanwhile
        output = None
    return Outcome(status=OutcomeStatus.SUCCEEDED, output=output, usage=None, evidence=Evidence.REPORTED)


def failed(error: BaseException) -> Outcome:
    """What a function that raised says of itself; an interruption leaves open what it did."""
    words = _words(error).encode(errors="backslashreplace").decode().replace("\0", "\\0")[:_LONGEST]
    return Outcome(
        status=OutcomeStatus.OUTCOME_UNKNOWN if _leaves_open(error) else OutcomeStatus.FAILED,
        error={"category": type(error).__name__, "message": words},
        usage=None,
        evidence=Evidence.REPORTED,
    )


def _leaves_open(error: BaseException) -> bool:
    """Whether nobody knows what was done; of several errors, one of which that is true is enough."""
    if isinstance(error, BaseExceptionGroup):
        return any(_leaves_open(each) for each in error.exceptions)
    return not isinstance(error, Exception) or isinstance(error, OutcomeUnknown | CallStopped)


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as problem:  # noqa: BLE001  # the function's own class
        return f"it cannot be shown ({type(problem).__name__})"
