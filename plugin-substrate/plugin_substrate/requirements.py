"""What a plugin says it needs of the machine: the ``code.resources`` of its manifest, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from plugin_substrate.interface import is_amount


@dataclass(frozen=True, kw_only=True)
class ResourceRequirements:
    """Amounts of memory are in MB of 2**20 bytes, 0 for none; that of GPU memory counts only with ``requires_gpu``.

    Empty ``platforms`` mean any. The queue counts ``cpu_slots`` and ``tokens`` for each call, and gives each of
    ``devices`` to one worker at a time.
    """

    requires_gpu: bool = False
    min_gpu_vram_mb: float = 0.0
    min_system_ram_mb: float = 0.0
    platforms: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ()
    cpu_slots: float = 0.0
    devices: tuple[str, ...] = ()
    tokens: Mapping[str, float] = field(default_factory=dict)

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
    if name == "cpu_slots":
        return ("" if is_amount(value) else "must be a number, 0 or more"), value
    if name == "tokens":
        fits = isinstance(value, Mapping) and all(isinstance(key, str) and is_amount(value[key]) for key in value)
        return ("" if fits else "must be an object of numbers, 0 or more"), value
    fits = isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)
    return ("" if fits else "must be a list of texts"), tuple(value) if isinstance(value, list | tuple) else value
