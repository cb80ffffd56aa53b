"""What a plugin says it needs of the machine: the ``code.resources`` of its manifest, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from plugin_substrate.interface import is_amount


@dataclass(frozen=True, kw_only=True)
class ResourceRequirements:
    """Amounts are in MB of 2**20 bytes, 0 for none; that of GPU memory counts only with ``requires_gpu``.

    Empty ``platforms`` mean any.
    """

    requires_gpu: bool = False
    min_gpu_vram_mb: float = 0.0
    min_system_ram_mb: float = 0.0
    platforms: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ()

    @property
    def any_amount(self) -> bool:
        """Whether an amount has to be there before a call."""
        return self.min_system_ram_mb > 0 or (self.requires_gpu and self.min_gpu_vram_mb > 0)


def parse_requirements(data: Mapping[str, Any] | None, place: str, problems: list[str]) -> ResourceRequirements:
    """Read the section; what is wrong with it is added to ``problems`` and left at its default."""
    values: dict[str, Any] = {}
    for name, value in (data or {}).items():
        problem, values[name] = _check(name, value)
        if problem:
            problems.append(f"{place}.{name} {problem}, not {value!r:.80}")
            del values[name]
    return ResourceRequirements(**values)


def _check(name: str, value: object) -> tuple[str, Any]:
    if name not in {each.name for each in fields(ResourceRequirements)}:
        return "is unknown", value
    if name == "requires_gpu":
        return ("" if isinstance(value, bool) else "must be true or false"), value
    if name.startswith("min_"):
        return ("" if is_amount(value) else "must be a number of MB, 0 or more"), value
    fits = isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)
    return ("" if fits else "must be a list of texts"), tuple(value) if isinstance(value, list | tuple) else value
