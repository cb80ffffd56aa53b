"""Which language models calls may use."""

from __future__ import annotations

from functools import cached_property

from pydantic import BaseModel, ConfigDict

from plm_engine_core.control_plane.matching import Match, Matcher, any_of


class ModelRule(BaseModel):
    """The models that a call may name, as globs; what none of them matches is refused. An empty list refuses all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: tuple[str, ...]

    @cached_property
    def _matches(self) -> Matcher:
        return any_of(tuple(normal(each) for each in self.allowed), Match.GLOB)

    def allows(self, model: str) -> bool:
        """Whether a call may use this model, written in any case."""
        return self._matches(normal(model)) is True


def normal(model: str) -> str:
    """A model's id as it is compared and counted: trimmed, in lower case."""
    return model.strip().casefold()
