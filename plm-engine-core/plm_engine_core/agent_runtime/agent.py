"""What an agent is: something that looks at the history of its run and says what it would like to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from plm_engine_core.agent_runtime.executor import ARGUMENTS_REFUSED
from plm_engine_core.control_plane.admission.withheld import Withheld, withheld_of
from plm_engine_core.control_plane.runs.run import Run, Step
from plm_engine_core.control_plane.vocabulary import Reason, StepState


@dataclass(frozen=True, kw_only=True)
class Propose:
    """The next use of a capability; `arguments` are JSON values, `claims` what the agent says of it, for the policy."""

    step_id: str
    capability: str
    resource: str
    arguments: Mapping[str, Any]
    claims: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AskInput:
    """A question to a human, in place of a proposal; its answer is the output of the step, and data like any other.

    `schema` is the JSON Schema of the wanted answer, without `$ref` and `unevaluated...`; an empty one takes any JSON
    value. An ask that is denied, or that nobody answers in time, is a refused step with the reason `input_denied` or
    `input_expired`.
    """

    step_id: str
    question: str
    schema: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The end of the run."""

    succeeded: bool
    result: Any = None
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True, kw_only=True)
class History:
    """A run's recorded past: what it was given and every attempt of every step, refusals included.

    An agent is not shown what the driver asked humans before it would have failed the run: no step of its is that.
    """

    run: Run
    steps: Sequence[Step]

    def latest(self, step_id: str) -> Step | None:
        """The last attempt of a step."""
        return next((step for step in reversed(self.steps) if step.step_id == step_id), None)

    def outputs(self) -> dict[str, Any]:
        """The recorded output of every step that succeeded, but for those of which it was withheld."""
        succeeded = (step for step in self.steps if step.state is StepState.SUCCEEDED)
        return {step.step_id: step.output for step in succeeded if withheld_of(step) is None}

    def withheld(self) -> dict[str, Withheld]:
        """Of every step that succeeded and whose output was withheld: who withheld it, and why."""
        succeeded = (step for step in self.steps if step.state is StepState.SUCCEEDED)
        return {step.step_id: told for step in succeeded if (told := withheld_of(step)) is not None}


class Agent(Protocol):
    """Proposes; has no power of its own. The same history must give the same answer."""

    def next(self, history: History) -> Propose | AskInput | Finish:
        """The next proposal, a question to a human, or the end.

        Asked only when the last attempt is over; one that is open is repeated exactly as it was.
        """
        ...


def refusal(step: Step) -> tuple[str, str]:
    """Why an attempt did not succeed: a reason code and a sentence."""
    error = step.error or {}
    return str(error.get("reason") or error.get("category") or step.state.value), str(error.get("message") or "")


_NOT_NOW = frozenset({Reason.RATE_LIMIT_EXCEEDED.value, Reason.RESOURCE_LOCKED.value, Reason.HALTED.value})


def is_deferred(step: Step) -> bool:
    """Whether an attempt was only told "not now", or stopped for a halt: its turn comes, and it does not count."""
    return step.state in (StepState.DENIED, StepState.CANCELLED) and refusal(step)[0] in _NOT_NOW


def asks_anew(step: Step) -> bool:
    """Whether an attempt was only told that its approval counts no more, which says nothing of the call."""
    return step.state is StepState.DENIED and refusal(step)[0] == Reason.APPROVAL_MISMATCH


def is_open(step: Step) -> bool:
    """Whether an attempt settled nothing: the same proposal is made again, under the same step key."""
    if step.state is StepState.NOT_STARTED:
        return refusal(step)[0] != ARGUMENTS_REFUSED
    return is_deferred(step) or asks_anew(step) or step.state in (StepState.AWAITING_APPROVAL, StepState.SUPERSEDED)
