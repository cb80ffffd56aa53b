"""A proposal: what an agent would like to do, before anybody decided anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from plm_shared.canonical_json import JsonRefused
from plm_shared.idempotency import compute_content_hash
from plm_shared.ledger import uuid_text

from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.record_types import wrong_type
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import ExecutorKind

_LAST: Final = 2**31 - 1
_ACTORS: Final = ("human", "agent", "system")


def _is_set_of_texts(value: object) -> bool:
    return isinstance(value, frozenset | set) and all(isinstance(each, str) for each in value)


def _are_ids(values: tuple[object, ...]) -> bool:
    return all(isinstance(each, UUID) for each in values)


@dataclass(frozen=True, kw_only=True)
class Principal:
    """On whose behalf a run acts; a run worker never has more than this.

    `delegated_by` are those who had this principal ask, the first of them first: they decide none of its approvals.
    Under a delegation, `expires_at` is when it ends and `delegations_left` how often it may be handed on.

    Raises:
        InvalidRequest: a member is not what it should be. A text is no set of scopes, though its parts are in it.
    """

    user_id: UUID
    actor_kind: str
    scopes: frozenset[str]
    delegated_by: tuple[UUID, ...] = ()
    expires_at: datetime | None = None
    delegations_left: int | None = None

    def __post_init__(self) -> None:
        """See above."""
        until, left = self.expires_at, self.delegations_left
        for name, good, form in (
            ("user_id", isinstance(self.user_id, UUID), "a UUID"),
            ("actor_kind", self.actor_kind in _ACTORS, " or ".join(map(repr, _ACTORS))),
            ("scopes", _is_set_of_texts(self.scopes), "a set of texts"),
            ("delegated_by", type(self.delegated_by) is tuple and _are_ids(self.delegated_by), "a tuple of UUIDs"),
            ("expires_at", until is None or isinstance(until, datetime), "a datetime"),
            ("delegations_left", left is None or type(left) is int, "a whole number"),
        ):
            if not good:
                problem = f"'{name}' of a principal must be {form}, not {getattr(self, name)!r:.80}"
                raise InvalidRequest(problem, field=f"principal.{name}")

    @property
    def actor(self) -> str:
        """How events name it: `human:<user id>`."""
        return f"{self.actor_kind}:{uuid_text(self.user_id)}"

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        stored: dict[str, Any] = {
            "user_id": str(self.user_id),
            "actor_kind": self.actor_kind,
            "scopes": sorted(self.scopes),
        }
        if self.delegated_by:
            stored["delegated_by"] = [str(each) for each in self.delegated_by]
        if self.expires_at is not None:
            stored["expires_at"] = self.expires_at.isoformat()
        if self.delegations_left is not None:
            stored["delegations_left"] = self.delegations_left
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Principal:
        """Back from the stored form."""
        return cls(
            user_id=UUID(stored["user_id"]),
            actor_kind=stored["actor_kind"],
            scopes=frozenset(stored["scopes"]),
            delegated_by=tuple(UUID(each) for each in stored.get("delegated_by", ())),
            expires_at=datetime.fromisoformat(stored["expires_at"]) if "expires_at" in stored else None,
            delegations_left=stored.get("delegations_left"),
        )


_KINDS: Final = {
    "step_index": int,
    "attempt": int,
    "step_id": str,
    "capability": str,
    "resource": str,
    "agent": str,
    "arguments": Mapping,
    "principal": Principal,
    "tenant_id": UUID,
    "run_id": UUID,
    "executor_kind": ExecutorKind,
    "ticket_id": UUID | None,
}


def check_principal(who: Principal, *, field: str) -> None:
    """Refuse an act of nobody: whether somebody may do it, and who did it, could not be told.

    Raises:
        InvalidRequest: names the field.
    """
    if not isinstance(who, Principal):
        raise InvalidRequest(f"'{field}' must be the Principal whose act it is, not {who!r:.80}", field=field)


def check_place(step_index: object, attempt: object) -> None:
    """Refuse numbers of a step and an attempt that none can have.

    Raises:
        InvalidRequest: names the field.
    """
    if not (type(step_index) is type(attempt) is int and 0 <= step_index <= _LAST and 1 <= attempt <= _LAST):
        raise InvalidRequest(
            f"a step has an index from 0 and attempts from 1 up, not {step_index!s:.20}/{attempt!s:.20}",
            field="step_index",
        )


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One use of one capability, as an agent would like it.

    `arguments` are JSON values; files stand in them as artifact references. `claims` is what the agent says of it
    (`risk`, `weight`, `score`): recorded, and never a reason to trust it more. `step_key` is the same for every attempt
    of a step, so that an idempotent plugin applies its effect once. `ticket_id` names the approval an earlier admission
    of the same attempt asked for.

    Raises:
        InvalidRequest: the step or the attempt has a number that none can have, or a member is of another type.
    """

    tenant_id: UUID
    run_id: UUID
    fencing_token: int
    step_index: int
    attempt: int
    step_id: str
    capability: str
    resource: str
    arguments: Mapping[str, Any]
    principal: Principal
    executor_kind: ExecutorKind = ExecutorKind.PLUGIN
    ticket_id: UUID | None = None
    agent: str = ""
    claims: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sound = (
            type(self.step_index) is int
            and type(self.attempt) is int
            and isinstance(self.step_id, str)
            and isinstance(self.capability, str)
            and isinstance(self.resource, str)
            and isinstance(self.agent, str)
            and isinstance(self.arguments, (dict, Mapping))  # nearly always a dict, which is seen at once
            and isinstance(self.principal, Principal)
            and isinstance(self.tenant_id, UUID)
            and isinstance(self.run_id, UUID)
            and isinstance(self.executor_kind, ExecutorKind)
            and (self.ticket_id is None or isinstance(self.ticket_id, UUID))
        )
        if not sound:
            raise wrong_type(self, "a proposal", _KINDS)
        if not (0 <= self.step_index <= _LAST and 1 <= self.attempt <= _LAST):
            check_place(self.step_index, self.attempt)  # says what is amiss

    @property
    def step_key(self) -> str:
        """Names the effect of this step, whichever attempt applies it."""
        return f"{uuid_text(self.run_id)}/{self.step_index}"

    @property
    def command_id(self) -> str:
        """Names this admission, so that asking twice decides once."""
        ticket = f"/{self.ticket_id}" if self.ticket_id else ""
        return f"{uuid_text(self.run_id)}/{self.step_index}/{self.attempt}{ticket}"


def content_hash(value: Any, *, known_as: tuple[str, str] | None = None) -> str:
    """The hash of what is proposed or settled, in which the same value is the same in every process.

    `known_as` is a place within the value, and what its caller calls it.

    Raises:
        InvalidRequest: it is no JSON; names the path.
    """
    try:
        return compute_content_hash(value)
    except JsonRefused as error:
        place, name = known_as or ("payload.", "")
        path = name + error.path.removeprefix(place) if error.path.startswith(place) else error.path
        raise InvalidRequest(f"it cannot be recorded: {path}: {error.problem}", field=path) from error


def check_claims(claims: object) -> None:
    """Refuse what an agent claims when it is no JSON object.

    Raises:
        InvalidRequest: names the path.
    """
    if not isinstance(claims, (dict, Mapping)):  # nearly always a dict, which is seen at once
        raise InvalidRequest(f"claims must be an object, not {type(claims).__name__}", field="claims")
    if claims:
        content_hash({"claims": dict(claims)})


def proposal_digest(proposal: Proposal, capability: CapabilityDescriptor | None) -> str:
    """What an approval is bound to: capability, version, resource and the security-relevant arguments.

    A marked argument that is missing never equals one that is present, whatever its value.

    Raises:
        InvalidRequest: the proposal is no JSON; names the path.
    """
    names = capability.security_relevant if capability is not None and capability.security_relevant else None
    arguments = (
        {name: [proposal.arguments[name]] if name in proposal.arguments else [] for name in names}
        if names is not None
        else {name: [value] for name, value in proposal.arguments.items()}
    )
    bound_to = {
        "capability": proposal.capability,
        "version": capability.version if capability is not None else None,
        "resource": proposal.resource,
        "arguments": arguments,
    }
    try:
        return content_hash(bound_to)
    except InvalidRequest:
        content_hash(dict(proposal.arguments), known_as=("payload", "arguments"))  # as the proposal has them
        raise
