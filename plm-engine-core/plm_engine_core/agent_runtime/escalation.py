"""Escalation of a failure: a human is asked before a run fails because a step is exhausted or autonomy is too low.

It is an ask of the driver, at the place where the next attempt would stand, and allows nothing: after the answer
"again" the same proposal is made again, and decided as ever. All of it follows from the history alone, so whoever
drives the run next says the same. (`approval.escalation` of a policy is something else: it hands a ticket on in time.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from plm_engine_core.agent_runtime.agent import Finish, refusal
from plm_engine_core.control_plane.admission.ask import Failure
from plm_engine_core.control_plane.runs.run import Step
from plm_engine_core.control_plane.texts import LONGEST_NAME
from plm_engine_core.control_plane.vocabulary import PROVIDE_INPUT, Reason, StepState

ATTEMPTS_EXHAUSTED: Final = "attempts_exhausted"
AGAIN: Final = "again"
"""The one answer; who wants the run to end denies the ticket."""

_SUFFIX = "/escalation"
_LONGEST_MESSAGE = 1_000


@dataclass(frozen=True, kw_only=True)
class Escalation:
    """What the driver asks humans in place of failing the run; no move of an agent."""

    step_id: str
    question: str
    schema: Mapping[str, Any]
    failure: Failure


def escalates(step: Step) -> Failure | None:
    """What an attempt escalates; None of every attempt that an agent made."""
    told = step.decision.get("escalates") if isinstance(step.decision, Mapping) else None
    if step.capability != PROVIDE_INPUT or not isinstance(told, Mapping):
        return None
    return Failure(**{name: told.get(name) for name in ("step", "attempt", "reason", "message")})  # type: ignore[arg-type]  # it is looked up


def of_exhausted(steps: Sequence[Step], problem: str) -> Escalation | None:
    """Asks in place of giving the last step up; None where what came to nothing was an ask itself."""
    return _raised(steps[-1], ATTEMPTS_EXHAUSTED, problem) if steps else None


def of_denied(steps: Sequence[Step]) -> Escalation | None:
    """Asks in place of the end, where the last proposal was denied as beyond the agent's autonomy."""
    last = steps[-1] if steps else None
    if last is None or last.state is not StepState.DENIED:
        return None
    reason, message = refusal(last)
    return _raised(last, reason, message) if reason == Reason.AUTONOMY_TOO_LOW.value else None


def proposed_again(steps: Sequence[Step], failure: Failure) -> Step | None:
    """The attempt that is made again after the answer; None where the record does not have it."""
    place = (failure.step, failure.attempt)
    found = [step for step in steps if (step.step_index, step.attempt) == place and step.capability != PROVIDE_INPUT]
    return found[0] if found else None


def end_of(answered: Step, failure: Failure) -> Finish:
    """How the run fails when nobody said "again": as it would have failed, with what became of the question."""
    message = f"{failure.message}; a human was to be asked: {refusal(answered)[1]}"
    return Finish(succeeded=False, reason=failure.reason, message=message)


def _raised(last: Step, reason: str, problem: str) -> Escalation | None:
    if last.capability == PROVIDE_INPUT:
        return None
    message = _shown(f"step {last.step_id}: {problem}")
    return Escalation(
        step_id=last.step_id[: LONGEST_NAME - len(_SUFFIX)] + _SUFFIX,
        question=f"The run would fail as {reason}: {message}\n\n"
        f'Answer "{AGAIN}" once that was mended: {last.capability} is then proposed again as it was, and decided as '
        "ever. Deny, and the run fails.",
        schema={"const": AGAIN},
        failure=Failure(step=last.step_index, attempt=last.attempt, reason=reason, message=message),
    )


def _shown(text: str) -> str:
    """Words of agents and plugins on one line that can be stored, shown and read to its end."""
    bounded = text[: _LONGEST_MESSAGE + 1]
    plain = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in bounded)
    return plain if len(plain) <= _LONGEST_MESSAGE else f"{plain[: _LONGEST_MESSAGE - 1]}…"
