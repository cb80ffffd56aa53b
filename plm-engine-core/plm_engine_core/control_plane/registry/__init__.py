"""What may be proposed: the registered capabilities."""

from plm_engine_core.control_plane.registry.capabilities import (
    CapabilityDescriptor,
    CapabilityRegistry,
    CostBound,
    load_capabilities,
)

__all__ = ["CapabilityDescriptor", "CapabilityRegistry", "CostBound", "load_capabilities"]
