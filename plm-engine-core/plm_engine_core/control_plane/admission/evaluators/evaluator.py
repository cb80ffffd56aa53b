"""What an evaluator is: a second opinion on a proposal, which a policy may ask for before it decides."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from plm_engine_core.control_plane.policy import Facts, Proposed


@dataclass(frozen=True, kw_only=True)
class EvaluatorResult:
    """What an evaluator answers; `reason` is read by people, and stored."""

    allow: bool
    reason: str = ""


class Evaluator(Protocol):
    """One configured evaluator.

    `evaluate` is a coroutine function, and then cancelled when its time is over; or, where it computes, a plain
    function, which then runs in a thread of its own. Whatever it raises, and whatever it returns that is no
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
