"""The policy: which one decides, which one only watches, and putting another one in force."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter
from plm_engine_core.control_plane.policy import PolicySnapshot, read_policy
from plm_engine_core.control_plane.vocabulary import PolicyRole

from plm_backend.dependencies import TheCaller, ThePlatform
from plm_backend.json_body import JsonRoute
from plm_backend.problems import BODIES, DOORS, documented
from plm_backend.schemas import ActivationCreate, ActivationDocument, PolicyDocument, PolicyName, activation_document

router = APIRouter(prefix="/v1/policy", tags=["policy"], route_class=JsonRoute)


@router.get("", operation_id="getPolicy", response_model=PolicyDocument, responses=documented(*DOORS))
async def get_policy(platform: ThePlatform, _: TheCaller) -> Any:
    """Which policy decides for all tenants, as this process sees it. Who put it in force stands in the record."""
    standing = await platform.control_plane.storage.policies.standing()
    return PolicyDocument(
        deciding=_name(platform.control_plane.policy),
        file=_name(platform.file_policy),
        activated=standing.digests[0],
        shadow=standing.digests[1],
    )


@router.post(
    "/activations",
    status_code=201,
    operation_id="activatePolicy",
    response_model=ActivationDocument,
    responses=documented(*DOORS, *BODIES, 409),
)
async def activate(body: ActivationCreate, platform: ThePlatform, caller: TheCaller) -> Any:
    """Put a policy in force for all tenants, or make it the shadow. Needs `plm.policy.activate` and a human.

    `previous` is the digest that has the role now, null where none has: of two who act at once one is refused (409).
    """
    policy = None if body.policy is None else read_policy(json.dumps(body.policy), source="policy")
    made = await platform.control_plane.activate_policy(
        caller.tenant_id,
        policy,
        role=PolicyRole(body.role),
        previous=body.previous,
        reason=body.reason,
        by=caller.principal,
    )
    return activation_document(made)


def _name(policy: PolicySnapshot) -> PolicyName:
    return PolicyName(digest=policy.digest, version=policy.version)
