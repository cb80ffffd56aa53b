"""Policies and their activations."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from plm_engine_core.control_plane.activation import Activation, Roles
from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.storage.memory.books import Books
from plm_engine_core.control_plane.storage.memory.values import storable_text
from plm_engine_core.control_plane.vocabulary import PolicyRole


class MemoryPolicies:
    """Policies of the whole system, in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def standing(self) -> Roles:
        """The newest activation of each role."""
        async with self._books.turn() as books:
            return Roles(active=_newest(books, PolicyRole.ACTIVE), shadow=_newest(books, PolicyRole.SHADOW))

    async def content(self, digest: str) -> str:
        """The canonical text of a policy."""
        async with self._books.turn() as books:
            row = books.policy_versions.get(None, digest)
            if row is None:
                raise NotFound("policy", digest)
            return str(row["content"])

    async def history(self, *, limit: int) -> Sequence[Activation]:
        """The newest activations, newest first."""
        async with self._books.turn() as books:
            return _activations(books)[::-1][:limit]

    async def activate(
        self,
        tenant_id: UUID,
        role: PolicyRole,
        policy: PolicySnapshot | None,
        *,
        previous: str | None,
        reason: str,
        by: UUID,
        actor: str,
    ) -> Activation | None:
        """Record that a policy has a role now, if `previous` still had it; None when it had not."""
        async with self._books.turn() as books:
            newest = _newest(books, role)
            if (newest and newest.digest) != previous:
                return None
            if policy is not None:
                books.policy_versions.put(None, policy.digest, {"content": policy.content})
            made = Activation(
                number=len(books.policy_activations.rows(None)) + 1,
                role=role,
                digest=policy.digest if policy is not None else None,
                version=policy.version if policy is not None else None,
                previous=previous,
                reason=storable_text(reason),
                activated_by=by,
                activated_at=books.now(),
            )
            books.policy_activations.put(None, made.number, {"activation": made})
            books.append(tenant_id, TENANT_STREAM, made.kind, actor, made.to_json())
            return made


def _activations(books: Books) -> list[Activation]:
    return [row["activation"] for row in books.policy_activations.rows(None)]


def _newest(books: Books, role: PolicyRole) -> Activation | None:
    return next((made for made in reversed(_activations(books)) if made.role is role), None)
