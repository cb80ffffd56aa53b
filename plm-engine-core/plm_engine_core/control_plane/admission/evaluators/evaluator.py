"""What an evaluator is: a second opinion on a proposal, on what a run is given or on what a call gave back."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from plm_engine_core.control_plane.policy import Facts, Proposed
from plm_engine_core.control_plane.vocabulary import EvaluationPhase


@dataclass(frozen=True, kw_only=True)
class EvaluatorResult:
    """What an evaluator answers; `reason` is read by people, and stored.

    `metadata` is stored beside, and nothing decides by it: a JSON object of plain values (dict, list, str, int, float,
    bool, None), at most 4 000 bytes and 8 deep. Any other makes the whole answer none, which is a denial. Of an output
    that is withheld, reason and metadata are what is kept, so they must not repeat it.
    """

    allow: bool
    reason: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What is asked about in the phases `input` and `output`; nothing of it is to be changed.

    `document` holds the roots that paths start from. Of a run that is to be created: `agent` (its name), `input` and
    `principal`. Of what a call gave back: `capability`, and as far as there are any `output`, `error` and `artifacts`.
    """

    phase: EvaluationPhase
    document: Mapping[str, Any]


class Evaluator(Protocol):
    """One configured evaluator.

    One that has a second method, `examine(self, examined: Examined)`, may be asked in the phases `input` and `output`
    as well; it answers the same.

    `evaluate`, as `examine`, is a coroutine function, and then cancelled when its time is over; or, where it computes,
    a plain function, which then runs in a thread of its own. Whatever it raises, and whatever it returns that is no
    `EvaluatorResult`, is a denial.
    """

    kind: ClassVar[str]
    """How policies name evaluators of this class."""

    config_schema: ClassVar[type[BaseModel]]
    """What `config` in the policy is checked against; the constructor takes an instance."""

    def __init__(self, config: Any) -> None:
        """Make one from its checked configuration; a ValueError says what is wrong with it."""
        ...

    def evaluate(self, proposal: Proposed, facts: Facts) -> EvaluatorResult | Awaitable[EvaluatorResult]:
        """Say whether the proposal may go on."""
        ...
