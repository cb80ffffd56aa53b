"""Capabilities as programs write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.registry.capabilities import (
    CapabilityDescriptor,
    CapabilityRegistry,
    load_capabilities,
)

Written = Mapping[str, str | CapabilityDescriptor] | str | Path
"""A file's path; or by id the mode, or everything that is known of a capability."""


def registry_of(written: Written | CapabilityRegistry) -> CapabilityRegistry:
    """The registry that was written down.

    Raises:
        InvalidRequest: naming what is missing, unknown or wrong.
    """
    if isinstance(written, CapabilityRegistry):
        return written
    if isinstance(written, str | Path):
        return load_capabilities(Path(written))
    return CapabilityRegistry(_descriptor(name, what) for name, what in written.items())


def _descriptor(name: str, what: str | CapabilityDescriptor) -> CapabilityDescriptor:
    if isinstance(what, CapabilityDescriptor):
        return what
    described = {"id": name, "description": f"a function of this process: {name}", "mode": what, "plugin": "python"}
    try:
        return CapabilityDescriptor.model_validate(described)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"capability {name!r} is refused: {where}: {first['msg']}", field="capabilities"
        ) from error
