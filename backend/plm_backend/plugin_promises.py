"""Whether the plugins of a node are what its capability file says of them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from plm_engine_core.control_plane.registry import CapabilityRegistry
from plugin_substrate.metadata import PluginMeta

from plm_backend.errors import SetupError

logger = logging.getLogger(__name__)


def check_capabilities(registry: CapabilityRegistry, plugin: Callable[[str], PluginMeta | None]) -> None:
    """Refuse a registration that promises more than its plugin does; one without a plugin here is told of.

    `plugin` answers what this node has of a name.

    Raises:
        SetupError: naming the capability and the plugin.
    """
    for capability in registry:
        meta = plugin(capability.plugin)
        if meta is None:
            logger.warning(
                "plugin %s of %s is not installed on this node; install it with `cjm-ctl install-all`",
                capability.plugin,
                capability.id,
            )
            continue
        for word in ("idempotent", "stateless"):
            if getattr(capability, word) and not getattr(meta, word):
                raise SetupError(
                    f"capability {capability.id} is registered as {word}, but plugin {meta.name} does not "
                    "declare itself so; correct one of them"
                )
        if meta.manifest.asked_isolation.network and not capability.network:
            raise SetupError(
                f"plugin {meta.name} reaches a network, so a call of {capability.id} may cost anything: register it "
                "with network: true and cost.max_eur, the most one call may cost"
            )
