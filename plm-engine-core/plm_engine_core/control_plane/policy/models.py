"""Which language models calls may use."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plm_engine_core.control_plane.matching import Match, Matcher, any_of
from plm_engine_core.control_plane.policy.frozen import Table
from plm_engine_core.control_plane.vocabulary import ActionTier

ADDED = ("tiers", "default_tier", "by_tier", "users")
"""Members that the first form did not have."""


class ModelRefusal(NamedTuple):
    """The place in the policy that refuses a model, and what would pass there."""

    rule: str
    unblock: str


class UserModels(BaseModel):
    """The models that one user's calls may name, as globs and as model tiers, whatever else is said of models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: tuple[str, ...] = ("*",)
    tiers: tuple[str, ...] | None = None

    @cached_property
    def matches(self) -> Matcher:
        """Of a model's name, whether `allowed` has it."""
        return _globs(self.allowed)


class ModelRule(BaseModel):
    """The models that a call may name, as globs; what none of them matches is refused. An empty list refuses all.

    `tiers` sorts models into model tiers, by globs, of which the first that matches counts; a model that none of them
    lists is of the `default_tier`, and without one of no tier. `by_tier` says which model tiers the calls of an action
    tier may use, that being the tier which the policy gives the capability; an action tier that is left out may use
    all. What `users` says of a user, the one for whom the call is made, is the whole answer for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: tuple[str, ...]
    tiers: Table[str, tuple[str, ...]] = Field(default_factory=lambda: MappingProxyType({}))
    default_tier: str | None = None
    by_tier: Table[ActionTier, tuple[str, ...]] = Field(default_factory=lambda: MappingProxyType({}))
    users: Table[UUID, UserModels] = Field(default_factory=lambda: MappingProxyType({}))

    @model_validator(mode="after")
    def _names_known_tiers(self) -> Self:
        named: dict[str, tuple[str, ...]] = {f"by_tier.{tier.value}": names for tier, names in self.by_tier.items()}
        named |= {f"users.{user}.tiers": each.tiers or () for user, each in self.users.items()}
        if self.default_tier is not None:
            named["default_tier"] = (self.default_tier,)
        for place, names in named.items():
            for name in names:
                if name not in self.tiers:
                    raise ValueError(f"{place} names the model tier {name!r}, which tiers does not list")
        for globs in (self.allowed, *self.tiers.values(), *(each.allowed for each in self.users.values())):
            _globs(globs)  # a bad one is told now, and not when a call is decided
        return self

    @cached_property
    def matches(self) -> Matcher:
        """Of a model's name, whether `allowed` has it."""
        return _globs(self.allowed)

    @cached_property
    def _sorted(self) -> tuple[tuple[str, Matcher], ...]:
        return tuple((name, _globs(globs)) for name, globs in self.tiers.items())

    def tier_of(self, model: str) -> str | None:
        """The model tier of a model, written in any case; None where it has none, or cannot be told."""
        name = normal(model)
        for tier, matches in self._sorted:
            found = matches(name)
            if found is not False:
                return tier if found else None
        return self.default_tier

    def refuses(self, model: str | None, *, tier: ActionTier, user: UUID) -> ModelRefusal | None:
        """Why a call of an action tier, made for `user`, may not use this model; None if it may."""
        own = self.users.get(user)
        if own is None:
            said: ModelRule | UserModels = self
            place, by, tiers = "models", f"by_tier.{tier.value}", self.by_tier.get(tier)
        else:
            said = own
            place, by, tiers = f"models.users.{user}", "tiers", own.tiers
        if model is None or said.matches(normal(model)) is not True:
            words = f"a model that the policy allows: {', '.join(said.allowed) or 'none'}"
            return ModelRefusal(f"{place}.allowed", words)
        if tiers is not None and self.tier_of(model) not in tiers:
            return ModelRefusal(f"{place}.{by}", f"a model of the tiers {', '.join(tiers) or 'none'}")
        return None

    def unsaid(self) -> Mapping[str, Any]:
        """The members that the first form did not have and that say nothing here."""
        return {name: True for name in ADDED if not getattr(self, name)}


def normal(model: str) -> str:
    """A model's id as it is compared and counted: trimmed, in lower case."""
    return model.strip().casefold()


def _globs(patterns: tuple[str, ...]) -> Matcher:
    return any_of(tuple(normal(each) for each in patterns), Match.GLOB)
