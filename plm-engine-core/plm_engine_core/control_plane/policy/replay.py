"""Deciding recorded proposals again under another policy: what would be denied, asked or allowed, and its cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from plm_engine_core.control_plane.policy.decide import decide
from plm_engine_core.control_plane.policy.decision import Decision, Needs, Verdict
from plm_engine_core.control_plane.policy.facts import Facts, Proposed
from plm_engine_core.control_plane.policy.replay_costs import Costs, recorded_cost
from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import EvaluationPhase

MOST_EXAMPLES = 20
UNDECIDED = "undecided"
"""Instead of a verdict: the policy asks evaluators that were not asked when the proposal was recorded."""
UNREADABLE = "unreadable"
"""Instead of a verdict: what was recorded is no decision with its facts."""

_LONGEST_ERROR = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One recorded attempt: what was proposed, and the decision with the facts that it was made from."""

    run_id: str
    step_index: int
    attempt: int
    capability: str
    resource: str
    arguments: Mapping[str, Any]
    decision: Mapping[str, Any]
    spent: Mapping[str, str] | None = None
    """Per unit, what its call cost; None where none was settled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One attempt that would be decided otherwise."""

    attempt: Attempt
    before: str
    after: str
    rule: str
    message: str

    def to_json(self) -> dict[str, Any]:
        """The change as JSON values."""
        return {
            "run_id": self.attempt.run_id,
            "step": self.attempt.step_index,
            "attempt": self.attempt.attempt,
            "capability": self.attempt.capability,
            "before": self.before,
            "after": self.after,
            "rule": self.rule,
            "message": self.message,
        }


@dataclass(kw_only=True)
class Replay:
    """What a policy makes of recorded attempts; feed it any number of times.

    `outcomes` counts pairs of outcomes, before and after; `examples` holds some changes of each pair. `terms` counts
    what has to be asked for both times, and on other terms: pairs of what an approval needs. `costs` says what all of
    it set aside and spent, and would.
    """

    policy: PolicySnapshot
    attempts: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_capability: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    terms: Counter[tuple[str, str]] = field(default_factory=Counter)
    costs: Costs = field(default_factory=Costs)
    examples: list[Change] = field(default_factory=list)
    _capabilities: dict[str, tuple[Mapping[str, Any], CapabilityDescriptor]] = field(default_factory=dict)
    _shown: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def not_asked(self) -> tuple[str, ...]:
        """The evaluators of which a replay tells nothing: those of the phases in which nothing is proposed."""
        return tuple(spec.name for spec in self.policy.evaluators if spec.phase is not EvaluationPhase.CALL)

    def feed(self, attempts: Iterable[Attempt]) -> None:
        """Decide these attempts again."""
        for attempt in attempts:
            try:
                self._one(attempt)
            except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
                self._unreadable(attempt, error)

    @property
    def changed(self) -> int:
        """How many would be decided otherwise."""
        return sum(count for (before, after), count in self.outcomes.items() if before != after)

    @property
    def on_other_terms(self) -> int:
        """How many are asked for as they were, and need something else of who approves them."""
        return self.terms.total()

    def _one(self, attempt: Attempt) -> None:
        facts = self._facts(attempt.decision["facts"])
        before = str(attempt.decision["outcome"])
        recorded = recorded_cost(attempt.decision.get("reserve", {}), attempt.spent)
        answer = decided_again(attempt, self.policy, facts)
        after = UNDECIDED if isinstance(answer, Needs) else answer.outcome.value
        self.attempts += 1
        self.outcomes[before, after] += 1
        self.costs.add(recorded, before=before, after=after, bound=self._bound(answer, facts))
        if before != after:
            rule, message = "evaluators", "its evaluators were not asked when this was recorded"
            if isinstance(answer, Decision):
                rule, message = answer.rule, answer.message
            self._note(attempt, before, after, rule=rule, message=message)
        elif isinstance(answer, Decision) and answer.outcome is Verdict.ASK:
            terms = str(attempt.decision.get("unblock", ""))
            if terms != answer.unblock:
                self.terms[terms, answer.unblock] += 1

    def _bound(self, answer: Decision | Needs, facts: Facts) -> Mapping[str, Decimal]:
        """What would be set aside; what is undecided may be allowed, and counts as if it were."""
        if isinstance(answer, Decision):
            return answer.reserve
        return self.policy.plans.of(facts.capability).reserve if facts.capability is not None else {}

    def _unreadable(self, attempt: Attempt, error: Exception) -> None:
        """Count a record that is none; the others are decided all the same."""
        self.attempts += 1
        before = attempt.decision.get("outcome") if isinstance(attempt.decision, Mapping) else None
        pair = str(before or "none"), UNREADABLE
        self.outcomes[pair] += 1
        words = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        self._note(attempt, *pair, rule="", message=" ".join(words.split()))

    def _facts(self, stored: Mapping[str, Any]) -> Facts:
        """The stored facts; the same capability is read once."""
        recorded = stored["capability"]
        if recorded is None:
            return Facts.from_json(stored)
        known = self._capabilities.get(recorded["id"])
        if known is None or known[0] != recorded:
            known = (recorded, CapabilityDescriptor.model_validate(recorded))
            self._capabilities[recorded["id"]] = known
        return Facts.from_json(stored, capability=known[1])

    def _note(self, attempt: Attempt, before: str, after: str, *, rule: str, message: str) -> None:
        self.by_capability[attempt.capability, before, after] += 1
        if self._shown[before, after] >= MOST_EXAMPLES:
            return
        self._shown[before, after] += 1
        self.examples.append(Change(attempt=attempt, before=before, after=after, rule=rule, message=message))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "policy_digest": self.policy.digest,
            "attempts": self.attempts,
            "changed": self.changed,
            "on_other_terms": self.on_other_terms,
            "outcomes": [
                {"before": before, "after": after, "attempts": count}
                for (before, after), count in sorted(self.outcomes.items())
            ],
            "by_capability": [
                {"capability": capability, "before": before, "after": after, "attempts": count}
                for (capability, before, after), count in sorted(self.by_capability.items())
            ],
            "terms": [
                {"before": before, "after": after, "attempts": count}
                for (before, after), count in sorted(self.terms.items())
            ],
            **self.costs.to_json(),
            "examples": [each.to_json() for each in self.examples],
            "not_asked": list(self.not_asked),
        }


def decided_again(proposal: Proposed, policy: PolicySnapshot, facts: Facts) -> Decision | Needs:
    """What a policy decides on facts that were gathered for another one.

    `Needs`, without names, where that turns on an evaluator that has no answer only because nobody asked it then.
    """
    answer = decide(proposal, policy, facts)
    return Needs(evaluators=()) if isinstance(answer, Needs) or _asks_anew(answer, policy, facts) else answer


def _asks_anew(decision: Decision, policy: PolicySnapshot, facts: Facts) -> bool:
    if facts.evaluations is None or not policy.evaluators:
        return False
    answered = {each.name for each in facts.evaluations}
    missing = {
        f"evaluators.{spec.name}"
        for spec in policy.evaluators
        if spec.phase is EvaluationPhase.CALL and spec.name not in answered
    }
    undecided = any(leaf.holds is None and leaf.says.startswith("evaluator ") for leaf in decision.leaves)
    return decision.rule in missing or (bool(missing) and undecided)
