"""Policies and their activations in PostgreSQL: kept for good, changed by nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.activation import Activation, Roles
from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.events import TENANT_STREAM
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session
from plm_engine_core.control_plane.vocabulary import PolicyRole

NEWS_CHANNEL = "plm_policy_news"
"""Notified with each committed activation; who misses it looks every few seconds anyhow."""

_NEWEST = (
    "SELECT a.*, v.version FROM policy_activations AS a LEFT JOIN policy_versions AS v ON v.digest = a.digest "
    "WHERE a.role = %s ORDER BY a.number DESC LIMIT 1"
)


class PostgresPolicies:
    """Policies of the whole system, by digest."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def standing(self) -> Roles:
        """The newest activation of each role."""
        async with self._gateway.connection() as connection:
            return Roles(
                active=await self._newest(connection, PolicyRole.ACTIVE),
                shadow=await self._newest(connection, PolicyRole.SHADOW),
            )

    async def content(self, digest: str) -> str:
        """The canonical text of a policy."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute("SELECT content FROM policy_versions WHERE digest = %s", [digest])
            row = await cursor.fetchone()
        if row is None:
            raise NotFound("policy", digest)
        return str(row["content"])

    async def history(self, *, limit: int) -> Sequence[Activation]:
        """The newest activations, newest first."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute(
                "SELECT a.*, v.version FROM policy_activations AS a "
                "LEFT JOIN policy_versions AS v ON v.digest = a.digest ORDER BY a.number DESC LIMIT %s",
                [limit],
            )
            return [_activation(row) for row in await cursor.fetchall()]

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
        async with self._gateway.transaction(tenant_id) as connection:
            # Locked in a statement of its own, so that the next one sees what the holder before committed.
            await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('policy', 0))")
            newest = await self._newest(connection, role)
            if (newest and newest.digest) != previous:
                return None
            digest = await self._keep(connection, policy) if policy is not None else None
            cursor = await connection.execute(
                "INSERT INTO policy_activations (number, role, digest, previous, reason, activated_by) "
                "SELECT COALESCE(max(number), 0) + 1, %s, %s, %s, %s, %s FROM policy_activations RETURNING *",
                [role.value, digest, previous, reason, by],
            )
            row = await cursor.fetchone()
            if row is None:
                raise NotFound("policy", digest)
            made = _activation({**row, "version": policy and policy.version})
            await connection.execute("SELECT pg_notify(%s, '')", [NEWS_CHANNEL])
            await self._gateway.append(connection, tenant_id, TENANT_STREAM, made.kind, actor, made.to_json())
            return made

    async def _keep(self, connection: Session, policy: PolicySnapshot) -> str:
        await connection.execute(
            "INSERT INTO policy_versions (digest, version, content) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            [policy.digest, policy.version, policy.content],
        )
        return policy.digest

    async def _newest(self, connection: Session, role: PolicyRole) -> Activation | None:
        cursor = await connection.execute(_NEWEST, [role.value])
        row = await cursor.fetchone()
        return _activation(row) if row is not None else None


def _activation(row: Mapping[str, Any]) -> Activation:
    return Activation(**{**row, "role": PolicyRole(row["role"])})
