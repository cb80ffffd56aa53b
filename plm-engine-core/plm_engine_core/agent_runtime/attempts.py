"""Where in its run a proposal stands: which step, which attempt of it, under which approval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from plm_engine_core.agent_runtime.agent import asks_anew, is_deferred, is_open, refusal
from plm_engine_core.agent_runtime.escalation import escalates
from plm_engine_core.agent_runtime.retry import MAX_ATTEMPTS, MAX_LOSSES, MAX_PROPOSALS
from plm_engine_core.control_plane.admission.abandoned import ABANDONED, capability_of
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.runs.run import Step
from plm_engine_core.control_plane.vocabulary import StepState

_REFUSED = (StepState.DENIED, StepState.STEERED)


@dataclass(frozen=True, kw_only=True)
class Place:
    """One attempt of one step."""

    step_index: int
    attempt: int
    ticket_id: UUID | None = None


def claims_of(step: Step) -> Mapping[str, Any] | None:
    """What the agent said of a recorded proposal, for proposing the same again; None where nobody can tell."""
    facts = step.decision.get("facts") if isinstance(step.decision, Mapping) else None
    claims = facts.get("claims", {}) if isinstance(facts, Mapping) else None
    return claims if isinstance(claims, Mapping) else None


def next_place(last: Step | None) -> Place:
    """The place after the last recorded attempt.

    An open one is repeated, an approved one as the same attempt; a refused agent tries again at the same step, and so
    it goes on after an escalation; after anything else the next step begins. An approval that was not used yet goes
    along.
    """
    if last is None:
        return Place(step_index=0, attempt=1)
    if last.state is StepState.AWAITING_APPROVAL:
        return Place(step_index=last.step_index, attempt=last.attempt, ticket_id=last.ticket_id)
    if is_open(last) or last.state in _REFUSED or escalates(last) is not None:
        unused = last.ticket_id if is_deferred(last) and last.state is StepState.DENIED else None
        return Place(step_index=last.step_index, attempt=last.attempt + 1, ticket_id=unused)
    return Place(step_index=last.step_index + 1, attempt=1)


def repeats(now: CapabilityDescriptor | None, decided_on: CapabilityDescriptor) -> bool:
    """Whether a call that may have had its effect may be repeated as the capability is defined now.

    The same plugin knows the step key under which it applied the effect; another one would apply it once more.
    """
    return now is not None and now.idempotent and decided_on.idempotent and now.plugin == decided_on.plugin


def lost_calls(steps: Sequence[Step], place: Place) -> Sequence[CapabilityDescriptor]:
    """By which definitions earlier attempts of a step were made that may have had its effect."""
    return [
        capability_of(step)
        for step in steps
        if step.step_index == place.step_index and step.state is StepState.SUPERSEDED
    ]


def exhausted(steps: Sequence[Step], place: Place) -> str:
    """Why a step is not tried once more, or nothing when it may be; only what came after its last escalation counts."""
    earlier = [step for step in steps if step.step_index == place.step_index and step.attempt < place.attempt]
    answered = max((step.attempt for step in earlier if escalates(step) is not None), default=0)
    tries = [step for step in earlier if step.attempt > answered and not (is_deferred(step) or asks_anew(step))]
    lost = sum(refusal(step)[0] == ABANDONED for step in tries)
    if lost >= MAX_LOSSES:
        return f"its run worker was lost {lost} times; the step may be what takes them down"
    refused = sum(step.state in _REFUSED for step in tries)
    if refused < MAX_PROPOSALS and len(tries) - lost < MAX_ATTEMPTS:
        return ""
    return f"refused or come to nothing {len(tries)} times; the last time: {refusal(tries[-1])[1]}"
