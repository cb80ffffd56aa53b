"""What is different between two registries: what a reload says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor, CapabilityRegistry


@dataclass(frozen=True, kw_only=True)
class ChangedCapability:
    """A version that is in both and defined otherwise: what its members were and are, as JSON values."""

    id: str
    version: str
    members: Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class RegistryChanges:
    """What a registry has that the one before had not, what is gone, and what is defined otherwise, in that order."""

    added: tuple[CapabilityDescriptor, ...] = ()
    removed: tuple[CapabilityDescriptor, ...] = ()
    changed: tuple[ChangedCapability, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """The same in words, one line a version."""
        return (
            *(f"added {each.id} {each.version} ({each.status.value})" for each in self.added),
            *(f"removed {each.id} {each.version} (was {each.status.value})" for each in self.removed),
            *(
                f"changed {each.id} {each.version}: "
                + ", ".join(f"{name} {before!r} -> {after!r}" for name, (before, after) in each.members.items())
                for each in self.changed
            ),
        )

    def __str__(self) -> str:
        """The lines as one."""
        return "; ".join(self.lines) or "nothing changed"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "added": [_named(each) for each in self.added],
            "removed": [_named(each) for each in self.removed],
            "changed": [
                {
                    "id": each.id,
                    "version": each.version,
                    "members": {
                        name: {"before": before, "after": after} for name, (before, after) in each.members.items()
                    },
                }
                for each in self.changed
            ],
        }


def changes(before: CapabilityRegistry, after: CapabilityRegistry) -> RegistryChanges:
    """What `after` has otherwise than `before`, version by version; the order of the entries says nothing."""
    known = {(each.id, each.version): each for each in before.versions}
    new = {(each.id, each.version): each for each in after.versions}
    both = [(known[place], each) for place, each in new.items() if place in known and each != known[place]]
    return RegistryChanges(
        added=tuple(each for place, each in new.items() if place not in known),
        removed=tuple(each for place, each in known.items() if place not in new),
        changed=tuple(
            ChangedCapability(id=now.id, version=now.version, members=_members(then, now)) for then, now in both
        ),
    )


def _named(capability: CapabilityDescriptor) -> dict[str, str]:
    return {"id": capability.id, "version": capability.version, "status": capability.status.value}


def _members(then: CapabilityDescriptor, now: CapabilityDescriptor) -> dict[str, tuple[Any, Any]]:
    before, after = _flat(then), _flat(now)
    return {
        name: (before.get(name), after.get(name)) for name in {**before, **after} if before.get(name) != after.get(name)
    }


def _flat(capability: CapabilityDescriptor) -> dict[str, Any]:
    """Every member by its path; sets in an order of their own."""
    written = capability.model_dump(mode="json")
    for name, value in capability:
        if isinstance(value, frozenset):
            written[name] = sorted(map(str, value))
    cost = written.pop("cost")
    return {**written, **{f"cost.{name}": value for name, value in cost.items()}}
