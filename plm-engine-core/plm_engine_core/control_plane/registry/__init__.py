"""What may be proposed and by whom: the registered capabilities and agents, and what is handed on."""

from plm_engine_core.control_plane.registry.agents import AgentDescriptor, AgentRegistry, load_agents
from plm_engine_core.control_plane.registry.capabilities import (
    CapabilityDescriptor,
    CapabilityRegistry,
    CostBound,
    load_capabilities,
)
from plm_engine_core.control_plane.registry.changes import ChangedCapability, RegistryChanges, changes
from plm_engine_core.control_plane.registry.delegation import Delegation, narrowed, share_of

__all__ = [
    "AgentDescriptor",
    "AgentRegistry",
    "CapabilityDescriptor",
    "CapabilityRegistry",
    "ChangedCapability",
    "CostBound",
    "Delegation",
    "RegistryChanges",
    "changes",
    "load_agents",
    "load_capabilities",
    "narrowed",
    "share_of",
]
