"""What becomes of it when evaluators that must allow something do not; the same for each phase."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plm_engine_core.control_plane.policy.decision import Decision, Verdict
from plm_engine_core.control_plane.policy.facts import Evaluation
from plm_engine_core.control_plane.vocabulary import EvaluationPhase, EvaluationStatus, Reason

KEPT_NEXT_TIME = "nothing: the call was made and is not made again; for later ones, a policy whose evaluators allow it"
"""What would unblock what was withheld of a call."""

_UNBLOCKED_BY = {
    EvaluationPhase.INPUT: "giving the run what the evaluator allows",
    EvaluationPhase.CALL: "propose what the evaluator allows",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRefusal:
    """The evaluator that did not allow, and how that is told; `rule` is its place in the policy."""

    evaluation: Evaluation
    reason: Reason
    message: str
    rule: str
    unblock: str


def first_refusal(
    gates: Sequence[str], evaluations: Iterable[Evaluation], phase: EvaluationPhase
) -> GateRefusal | None:
    """The first of the gates that did not allow, cancelled ones last; None when all allowed.

    One that was not asked, or is not there, did not allow.
    """
    answers = {each.name: each for each in evaluations}
    refusals = [
        answers.get(name, Evaluation(name=name, status=EvaluationStatus.FAILED, reason="it was not asked"))
        for name in gates
    ]
    refusals = [each for each in refusals if each.status is not EvaluationStatus.ALLOWED]
    if not refusals:
        return None
    first = min(refusals, key=lambda each: each.status is EvaluationStatus.CANCELLED)
    denied = first.status is EvaluationStatus.DENIED
    words = f"evaluator {first.name} {'denies' if denied else f'gives no answer ({first.status.value})'}"
    return GateRefusal(
        evaluation=first,
        reason=Reason.EVALUATOR_DENIED if denied else Reason.EVALUATOR_FAILED,
        message=f"{words}: {first.reason}" if first.reason else words,
        rule=f"evaluators.{first.name}",
        unblock=KEPT_NEXT_TIME
        if phase is EvaluationPhase.OUTPUT
        else _UNBLOCKED_BY[phase]
        if denied
        else f"mend the evaluator {first.name}, or try again",
    )


def decision_of(refusal: GateRefusal | None) -> Decision:
    """The phases `input` and `output` as a decision, for who tries a policy: no stage has a part in it."""
    if refusal is None:
        return Decision(outcome=Verdict.ALLOW)
    return Decision(
        outcome=Verdict.DENY,
        reason=refusal.reason,
        message=refusal.message,
        rule=refusal.rule,
        unblock=refusal.unblock,
    )
