"""What stands in the books in place of what a call gave back, where an evaluator did not let that be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from plm_engine_core.control_plane.policy.gates import KEPT_NEXT_TIME
from plm_engine_core.control_plane.runs.run import Step
from plm_engine_core.control_plane.vocabulary import Reason

OUTPUT_WITHHELD: Final = "output_withheld"
"""The category of the error that stands in place of what was withheld, whatever state its step is in."""

_HALTED: Final = Reason.HALTED.value


@dataclass(frozen=True, kw_only=True)
class Withheld:
    """What a call gave back was not kept; the call was made all the same, and is not made again for that.

    `evaluator` is who did not allow it, and empty where no policy could be asked; `rule` is its place in the policy.
    `reason` is `evaluator_denied`, `evaluator_failed` or `policy_missing`. `digest` is SHA-256 over the canonical JSON
    of what was withheld, an object with `output`, `error` and `artifacts` as far as there were any; it is empty where
    that was no JSON. `metadata` is what the evaluator told beside.
    """

    evaluator: str
    rule: str
    reason: Reason
    message: str
    digest: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def in_place_of(self, error: Mapping[str, Any] | None) -> dict[str, Any]:
        """The error that is recorded. That a call was stopped by a halt stays: its step goes on when that is lifted."""
        halted = error is not None and error.get("reason") == _HALTED
        told: dict[str, Any] = {"evaluator": self.evaluator, "reason": self.reason.value}
        if self.digest:
            told["digest"] = self.digest
        if self.metadata:
            told["metadata"] = dict(self.metadata)
        return {
            "category": OUTPUT_WITHHELD,
            "reason": _HALTED if halted else self.reason.value,
            "message": self.message,
            "rule": self.rule,
            "unblock": KEPT_NEXT_TIME,
            "withheld": told,
        }


def withheld_of(step: Step) -> Withheld | None:
    """What was withheld of a recorded step; None when nothing was."""
    error = step.error or {}
    told = error.get("withheld")
    if error.get("category") != OUTPUT_WITHHELD or not isinstance(told, Mapping):
        return None
    return Withheld(
        evaluator=str(told.get("evaluator", "")),
        rule=str(error.get("rule", "")),
        reason=Reason(told["reason"]) if told.get("reason") in set(Reason) else Reason.EVALUATOR_FAILED,
        message=str(error.get("message", "")),
        digest=str(told.get("digest", "")),
        metadata=told.get("metadata") or {},
    )
