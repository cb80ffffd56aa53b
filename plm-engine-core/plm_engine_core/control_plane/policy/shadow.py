"""The shadow: a draft policy that is decided by beside the active one, without effect, and what it would change.

It looks at the same facts, so it costs one more decision and neither a question nor a wait. Where it turns on an
evaluator that the active policy did not ask in the same form, the answer is "undecided".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from plm_engine_core.control_plane.policy.decision import Decision
from plm_engine_core.control_plane.policy.facts import Facts, Proposed
from plm_engine_core.control_plane.policy.replay import MOST_EXAMPLES, UNDECIDED, Attempt, Change, decided_again
from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot

ERROR = "error"
"""Instead of a verdict: deciding failed, which the record says and nothing else notices."""

_LONGEST_ERROR = 300


def shadow_record(
    proposal: Proposed, shadow: PolicySnapshot, facts: Facts, decision: Decision, *, active: PolicySnapshot
) -> dict[str, Any]:
    """What is stored beside a decision of the active policy; it never raises and never changes that decision."""
    record: dict[str, Any] = {"digest": shadow.digest}
    try:
        answer = decided_again(proposal, shadow, _comparable(facts, shadow, active))
    except Exception as error:  # noqa: BLE001  # a draft's defect is part of what its trial is to find
        return {**record, "outcome": ERROR, "message": f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]}
    if not isinstance(answer, Decision):
        return {**record, "outcome": UNDECIDED}
    record["outcome"] = answer.outcome.value
    if answer.outcome is not decision.outcome or answer.reason is not decision.reason:
        said = {"reason": answer.reason and answer.reason.value, "rule": answer.rule, "message": answer.message}
        record |= {name: value for name, value in said.items() if value}
    return record


def _comparable(facts: Facts, shadow: PolicySnapshot, active: PolicySnapshot) -> Facts:
    """The facts without what evaluators said that only have their name in common."""
    if facts.evaluations is None:
        return facts
    same = {spec.name for spec in shadow.evaluators if spec in active.evaluators}
    return replace(facts, evaluations=tuple(each for each in facts.evaluations if each.name in same))


@dataclass(kw_only=True)
class ShadowReport:
    """What a shadow would have changed, from recorded attempts; feed it any number of times.

    `outcomes` counts pairs of outcomes, decided and shadow's; `examples` holds some of each pair that differs;
    `unreadable` counts records that are no decision, of which nobody can say whether this shadow saw them.
    """

    digest: str
    compared: int = 0
    unreadable: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: list[Change] = field(default_factory=list)
    _shown: Counter[tuple[str, str]] = field(default_factory=Counter)

    def feed(self, attempts: Iterable[Attempt]) -> None:
        """Count the attempts that this shadow saw."""
        for attempt in attempts:
            try:
                self._one(attempt)
            except (AttributeError, KeyError, TypeError):
                self.unreadable += 1

    def _one(self, attempt: Attempt) -> None:
        said = attempt.decision.get("shadow")
        if said is None or said["digest"] != self.digest:
            return
        before, after = str(attempt.decision["outcome"]), str(said["outcome"])
        self.compared += 1
        self.outcomes[before, after] += 1
        if before != after and self._shown[before, after] < MOST_EXAMPLES:
            self._shown[before, after] += 1
            rule, message = said.get("rule", ""), said.get("message", "")
            self.examples.append(Change(attempt=attempt, before=before, after=after, rule=rule, message=message))

    @property
    def changed(self) -> int:
        """How many the shadow would have decided otherwise, could not decide, or failed on."""
        return sum(count for (before, after), count in self.outcomes.items() if before != after)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "shadow_digest": self.digest,
            "compared": self.compared,
            "changed": self.changed,
            "unreadable": self.unreadable,
            "outcomes": [
                {"before": before, "after": after, "attempts": count}
                for (before, after), count in sorted(self.outcomes.items())
            ],
            "examples": [each.to_json() for each in self.examples],
        }
