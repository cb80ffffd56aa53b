"""The risk of a run: what its steps add up to, and sequences of them that matter together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from plm_engine_core.control_plane.documents import Whole
from plm_engine_core.control_plane.matching import Match, Matcher, any_of
from plm_engine_core.control_plane.policy.frozen import Table
from plm_engine_core.control_plane.policy.rules import Name
from plm_engine_core.control_plane.vocabulary import RiskLevel

MOST_ATTEMPTS = 1000
"""How many earlier attempts of a run are looked at, the newest; each older one counts the most that one can."""

_Points = Annotated[Whole, Field(ge=0, le=1_000_000)]
_DEFAULT = MappingProxyType({RiskLevel.LOW: 1, RiskLevel.MEDIUM: 3, RiskLevel.HIGH: 5})


class RiskPattern(BaseModel):
    """Capabilities (globs) one after the other, at most `gap` other steps between two of them; the last is proposed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    sequence: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2, max_length=10)]
    gap: Whole = Field(default=5, ge=0, le=50)
    risk: RiskLevel

    @cached_property
    def matchers(self) -> tuple[Matcher, ...]:
        """One for each capability of the sequence."""
        return tuple(any_of((glob,), Match.GLOB) for glob in self.sequence)

    @property
    def reach(self) -> int:
        """How many earlier steps it can span."""
        return (len(self.sequence) - 1) * (self.gap + 1)

    def ends_with(self, capabilities: Sequence[str]) -> bool:
        """Whether the last of these capabilities completes the sequence."""
        first, *rest = self.matchers
        at = [index for index, each in enumerate(capabilities) if first(each)]
        for matches in rest:
            nearest = set(at)
            at = [
                index
                for index, each in enumerate(capabilities)
                if matches(each) and any(index - back in nearest for back in range(1, self.gap + 2))
            ]
        return len(capabilities) - 1 in at


class GrantedAttempt(NamedTuple):
    """An attempt of a step that was granted, and not given back unused."""

    step_index: int
    capability: str


class RunRisk(BaseModel):
    """Each attempt counts the `points` of its risk; from as many as `raises` says a proposal has that risk at least."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: Table[RiskLevel, _Points] = Field(default_factory=lambda: _DEFAULT)
    raises: Table[RiskLevel, _Points] = Field(default_factory=lambda: MappingProxyType({}))
    patterns: tuple[RiskPattern, ...] = ()

    @field_validator("points")
    @classmethod
    def _every_level(cls, points: Mapping[RiskLevel, int]) -> Mapping[RiskLevel, int]:
        missing = [level.value for level in RiskLevel if level not in points]
        if missing:
            raise ValueError(f"points are missing for {', '.join(missing)}")
        return points

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.raises and not self.patterns:
            raise ValueError("give raises or patterns; without either it would raise nothing")
        doubled = [name for name, count in Counter(each.id for each in self.patterns).items() if count > 1]
        if doubled:
            raise ValueError(f"patterns has {doubled[0]} twice; names are what records refer to")
        return self

    def project(
        self, earlier: Sequence[GrantedAttempt], risk_of: Callable[[str], RiskLevel], *, unseen: int = 0
    ) -> RunSoFar:
        """What is kept of a run's earlier attempts, oldest first; `risk_of` rates a capability by itself.

        Before them there were `unseen` others. Each counts the most that one can, so that no run is rated lower than it
        is for being long. In a sequence a capability that a step tries again stands once: retries fill no gap.
        """
        reach = max((each.reach for each in self.patterns), default=0)
        counts = Counter(each.capability for each in earlier)
        capabilities = [each.capability for each, _ in groupby(earlier)]  # equal ones are of one step
        return RunSoFar(
            points=sum(count * self.points[risk_of(each)] for each, count in counts.items())
            + unseen * max(self.points.values()),
            recent=tuple(capabilities[-reach:]) if reach else (),
        )

    def raised(self, run: RunSoFar, capability: str, risk: RiskLevel) -> Iterator[tuple[RiskLevel, str]]:
        """The risks that one more step of this capability has at least, each with its place in the policy."""
        points = run.points + self.points[risk]
        for level, threshold in self.raises.items():
            if points >= threshold:
                yield level, f"run_risk.raises.{level.value}"
        for pattern in self.patterns:
            if pattern.ends_with((*run.recent, capability)):
                yield pattern.risk, f"run_risk.patterns.{pattern.id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSoFar:
    """A projection of a run's earlier attempts, made anew for each proposal and stored with its facts."""

    points: int = 0
    recent: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        return {"points": self.points, "recent": list(self.recent)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RunSoFar:
        """Back from the stored form."""
        return cls(points=stored["points"], recent=tuple(stored["recent"]))
