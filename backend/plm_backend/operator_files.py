"""The files that an operator writes for a node, read and held against each other: at its start and at each reload."""

from __future__ import annotations

from dataclasses import dataclass

from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry
from plm_engine_core.control_plane.policy import PolicySnapshot, load_policy
from plm_engine_core.control_plane.policy.lint import require_known_names
from plm_engine_core.control_plane.registry import CapabilityRegistry, load_capabilities

from plm_backend.catalog import AgentCatalog, load_catalog
from plm_backend.settings import Settings


@dataclass(frozen=True, kw_only=True)
class OperatorFiles:
    """What the files say; nothing of it is in force by that."""

    registry: CapabilityRegistry
    policy: PolicySnapshot
    agents: AgentCatalog


def read_files(settings: Settings) -> OperatorFiles:
    """Read capabilities, policy and plans.

    Raises:
        InvalidRequest: naming the file that cannot be used, and what in it is wrong or names no registered capability
            and no installed kind of evaluator.
    """
    registry = load_capabilities(settings.capabilities)
    policy = load_policy(settings.policy)
    require_known_names(policy, registry, source=settings.policy)
    EvaluatorRegistry.installed().build(policy, file=settings.policy)
    return OperatorFiles(registry=registry, policy=policy, agents=load_catalog(settings.agents, registry))
