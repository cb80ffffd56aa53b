"""Deciding recorded proposals again under another policy: what would be denied, asked or allowed, and its cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from plm_engine_core.control_plane.amounts import plain
from plm_engine_core.control_plane.policy.decide import decide
from plm_engine_core.control_plane.policy.decision import Decision, Needs, Verdict
from plm_engine_core.control_plane.policy.facts import Facts, Proposed
from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import BudgetUnit, EvaluationPhase

MOST_EXAMPLES = 20
UNDECIDED = "undecided"
"""Instead of a verdict: the policy asks evaluators that were not asked when the proposal was recorded."""
UNREADABLE = "unreadable"
"""Instead of a verdict: what was recorded is no decision with its facts."""

_LONGEST_ERROR = 300
_RESERVING = (Verdict.ALLOW.value, Verdict.ASK.value)


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


_Reserve = tuple[tuple[str, str | Decimal], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """How much of one unit is set aside, as it was decided and as it would be."""

    before: Decimal
    after: Decimal


def _sums(reserves: Counter[_Reserve]) -> dict[str, Decimal]:
    """By unit, over all calls."""
    sums: dict[str, Decimal] = {}
    for reserve, calls in reserves.items():
        for unit, amount in reserve:
            sums[str(unit)] = sums.get(str(unit), Decimal(0)) + calls * Decimal(amount)
    return sums


@dataclass(kw_only=True)
class Replay:
    """What a policy makes of recorded attempts; feed it any number of times.

    `outcomes` counts pairs of outcomes, before and after; `examples` holds some changes of each pair.
    """

    policy: PolicySnapshot
    attempts: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_capability: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: list[Change] = field(default_factory=list)
    _capabilities: dict[str, tuple[Mapping[str, Any], CapabilityDescriptor]] = field(default_factory=dict)
    _shown: Counter[tuple[str, str]] = field(default_factory=Counter)
    _reserved_before: Counter[_Reserve] = field(default_factory=Counter)
    _reserved_after: Counter[_Reserve] = field(default_factory=Counter)

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
    def reserved(self) -> dict[str, Reserved]:
        """By unit, what calls set aside that are allowed or asked for: an upper bound of what they cost and use.

        One that is undecided may be allowed, and counts as if it were. A capability that does not bound a unit sets
        nothing of it aside, and is not in its sums.
        """
        before, after = _sums(self._reserved_before), _sums(self._reserved_after)
        units = sorted({*before, *after} - set(BudgetUnit))
        return {
            unit: Reserved(before=before.get(unit, Decimal(0)), after=after.get(unit, Decimal(0)))
            for unit in (*(each.value for each in BudgetUnit), *units)
        }

    def _one(self, attempt: Attempt) -> None:
        facts = self._facts(attempt.decision["facts"])
        before = str(attempt.decision["outcome"])
        reserve = tuple(attempt.decision.get("reserve", {}).items())
        if reserve not in self._reserved_before:
            _sums(Counter([reserve]))  # so that what is no amount is found before anything is counted
        answer = decided_again(attempt, self.policy, facts)
        after = UNDECIDED if isinstance(answer, Needs) else answer.outcome.value
        self.attempts += 1
        self.outcomes[before, after] += 1
        if before in _RESERVING:
            self._reserved_before[reserve] += 1
        if isinstance(answer, Needs) and facts.capability is not None:
            self._reserved_after[tuple(self.policy.plans.of(facts.capability).reserve.items())] += 1
        elif isinstance(answer, Decision) and after in _RESERVING:
            self._reserved_after[tuple(answer.reserve.items())] += 1
        if before != after:
            rule, message = "evaluators", "its evaluators were not asked when this was recorded"
            if isinstance(answer, Decision):
                rule, message = answer.rule, answer.message
            self._note(attempt, before, after, rule=rule, message=message)

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
            "outcomes": [
                {"before": before, "after": after, "attempts": count}
                for (before, after), count in sorted(self.outcomes.items())
            ],
            "by_capability": [
                {"capability": capability, "before": before, "after": after, "attempts": count}
                for (capability, before, after), count in sorted(self.by_capability.items())
            ],
            "reserved": {
                unit: {"before": str(plain(each.before)), "after": str(plain(each.after))}
                for unit, each in self.reserved.items()
            },
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
