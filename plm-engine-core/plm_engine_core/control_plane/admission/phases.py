"""What evaluators are asked beside proposals: what a run is given, and what a call gave back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plm_engine_core.control_plane.admission.evaluators import Examined, ParallelPolicyEvaluator
from plm_engine_core.control_plane.admission.proposal import Principal, content_hash
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.admission.withheld import Withheld
from plm_engine_core.control_plane.policy import Evaluation, PolicySnapshot
from plm_engine_core.control_plane.policy.facts import document_of_input, document_of_output, who
from plm_engine_core.control_plane.policy.gates import GateRefusal, first_refusal
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import EvaluationPhase, OutcomeStatus, Reason

_WITHHELD = "what {} gave back was withheld:"


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What the evaluators of a phase answered, and the first that did not allow; None when all did."""

    evaluations: tuple[Evaluation, ...] = ()
    refusal: GateRefusal | None = None


async def examine_input(
    policy: PolicySnapshot,
    evaluators: ParallelPolicyEvaluator,
    *,
    agent: str,
    given: Mapping[str, Any],
    principal: Principal,
) -> Examination:
    """Ask about what a run would be given, every evaluator of the phase, whatever the input is."""
    document = document_of_input(agent, given, who(principal.user_id, principal.actor_kind, principal.scopes))
    return await _examined(EvaluationPhase.INPUT, policy.plans.input_gates, evaluators, document)


async def examine_output(
    policy: PolicySnapshot,
    evaluators: ParallelPolicyEvaluator,
    capability: CapabilityDescriptor,
    given_back: Mapping[str, Any],
) -> Examination:
    """Ask about what a call of `capability` gave back: `output`, `error` and `artifacts`, as far as there are any."""
    gates = policy.plans.output_gates(capability.id)
    return await _examined(EvaluationPhase.OUTPUT, gates, evaluators, document_of_output(capability, given_back))


async def _examined(
    phase: EvaluationPhase, gates: tuple[str, ...], evaluators: ParallelPolicyEvaluator, document: Mapping[str, Any]
) -> Examination:
    if not gates:
        return Examination()
    evaluations = await evaluators.examine_all(gates, Examined(phase=phase, document=document))
    return Examination(evaluations=evaluations, refusal=first_refusal(gates, evaluations, phase))


def given_back(outcome: Outcome) -> dict[str, Any]:
    """What a call gave back, of which evaluators are asked; empty where it gave nothing.

    A call that succeeded gave an output, be it null. One that never left the host gave nothing: its error is ours.
    """
    if outcome.status is OutcomeStatus.NOT_STARTED:
        return {}
    found: dict[str, Any] = {}
    if outcome.status is OutcomeStatus.SUCCEEDED or outcome.output is not None:
        found["output"] = outcome.output
    if outcome.error is not None:
        found["error"] = dict(outcome.error)
    if outcome.artifacts:
        found["artifacts"] = [
            {"name": each.name, "mime_type": each.mime_type, "size_bytes": each.size_bytes, "sha256": each.sha256}
            for each in outcome.artifacts
        ]
    return found


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is booked of an outcome; `withheld` says what stands in place of the rest, and who said so."""

    evaluations: tuple[Evaluation, ...] = ()
    withheld: Withheld | None = None


NOTHING_ASKED = Kept()
"""Of a call that no evaluator is asked about, everything is kept."""


async def keep(
    policy: PolicySnapshot,
    evaluators: ParallelPolicyEvaluator,
    capability: CapabilityDescriptor,
    outcome: Outcome,
    *,
    opaque: bool,
) -> Kept:
    """Have the evaluators of the phase `output` say whether what a call gave back may be kept.

    Answers in the longest time of one of them, and never raises for what they do. Where what it gave back is `opaque`,
    nobody can be asked about it, and that does not allow.

    Raises:
        InvalidRequest: the outcome holds what is no JSON; names the path.
    """
    given = given_back(outcome)
    gates = policy.plans.output_gates(capability.id)
    if not given or not gates:
        return NOTHING_ASKED
    if opaque:
        words = f"{_WITHHELD.format(capability.id)} it is no JSON, or too long, so evaluator {gates[0]} cannot be asked"
        reason = Reason.EVALUATOR_FAILED
        return Kept(withheld=Withheld(evaluator=gates[0], rule=f"evaluators.{gates[0]}", reason=reason, message=words))
    digest = content_hash(given)
    found = await examine_output(policy, evaluators, capability, given)
    refusal = found.refusal
    if refusal is None:
        return Kept(evaluations=found.evaluations)
    return Kept(
        evaluations=found.evaluations,
        withheld=Withheld(
            evaluator=refusal.evaluation.name,
            rule=refusal.rule,
            reason=refusal.reason,
            message=f"{_WITHHELD.format(capability.id)} {refusal.message}",
            digest=digest,
            metadata=refusal.evaluation.metadata,
        ),
    )


def keep_nothing(capability: CapabilityDescriptor, outcome: Outcome, why: str, *, opaque: bool) -> Kept:
    """Where the policy in force cannot be loaded nobody knows whom to ask, and that does not allow."""
    given = given_back(outcome)
    if not given:
        return NOTHING_ASKED
    return Kept(
        withheld=Withheld(
            evaluator="",
            rule="policy",
            reason=Reason.POLICY_MISSING,
            message=f"{_WITHHELD.format(capability.id)} {why}",
            digest="" if opaque else content_hash(given),
        )
    )
