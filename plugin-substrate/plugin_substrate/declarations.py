"""What a plugin declares about itself beside its code: where it belongs and which variables it reads.

The JSON form stands in the manifest. Reading one checks every type; what is wrong is named, all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from plugin_substrate.interface import DATA_DIR_VARIABLE, MODELS_DIR_VARIABLE, EnvVarSpec

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_Test = Callable[[object], bool]


@dataclass(frozen=True, kw_only=True)
class PluginTaxonomy:
    """Where a plugin belongs: a ``domain`` such as ``transcription``, and its ``role`` there, a class name."""

    domain: str = ""
    role: str = ""
    interface_fqcn: str = ""

    @property
    def label(self) -> str:
        """The domain for people: ``speech_to_text`` is "Speech To Text"."""
        return self.domain.replace("_", " ").title()


def parse_taxonomy(data: object, place: str, problems: list[str]) -> PluginTaxonomy:
    """Read a taxonomy, adding to ``problems`` what is wrong with it."""
    wanted = {"domain": _TEXT, "role": _TEXT, "interface_fqcn": _TEXT}
    return PluginTaxonomy(**_checked(data, place, problems, PluginTaxonomy, wanted))


def parse_worker_env(data: object, place: str, problems: list[str]) -> tuple[EnvVarSpec, ...]:
    """Read the variables a worker declares, adding to ``problems`` what is wrong with them."""
    wanted = {
        "name": _TEXT,
        "secret": _TRUTH,
        "required": _TRUTH,
        "label": _TEXT,
        "description": _TEXT,
        "default": _TEXT_OR_NULL,
        "options": _TEXTS_OR_NULL,
    }
    specs = []
    for number, entry in enumerate(data if isinstance(data, list | tuple) else [data]):
        values = _checked(entry, f"{place}[{number}]", problems, EnvVarSpec, wanted)
        spec = EnvVarSpec(**{"name": "", **values})
        problems += [f"{place}[{number}]{problem}" for problem in _problems_of(spec)]
        specs.append(spec)
    names = [spec.name for spec in specs]
    problems += [f"{place} declares {name!r} twice" for name in sorted(set(names)) if names.count(name) > 1]
    return tuple(specs)


def _problems_of(spec: EnvVarSpec) -> list[str]:
    problems = []
    if not _VARIABLE.fullmatch(spec.name) or spec.name in (DATA_DIR_VARIABLE, MODELS_DIR_VARIABLE):
        problems.append(f".name must be a variable's name, and not one of the host's, not {spec.name!r:.80}")
    if spec.secret and (spec.default is not None or spec.options is not None):
        problems.append(f": {spec.name} is a secret, so default and options have no place in a manifest")
    if spec.default is not None and spec.options is not None and spec.default not in spec.options:
        problems.append(f".default of {spec.name} must be one of its options, not {spec.default!r:.80}")
    if "\0" in (spec.default or ""):
        problems.append(f".default of {spec.name} holds a NUL")
    return problems


def _checked(
    data: object, place: str, problems: list[str], kind: type, wanted: Mapping[str, tuple[str, _Test]]
) -> dict[str, Any]:
    """Return the values that have their types, by field."""
    if not isinstance(data, dict):
        problems.append(f"{place} must be an object, not {data!r:.80}")
        return {}
    problems += [f"unknown key {f'{place}.{key}'!r}" for key in data if key not in _names(kind)]
    values = {}
    for key, (what, fits) in wanted.items():
        if key not in data:
            continue
        if fits(data[key]):
            values[key] = data[key]
        else:
            problems.append(f"{place}.{key} must be {what}, not {data[key]!r:.80}")
    return values


def _names(kind: Any) -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(kind))


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


_TEXT: tuple[str, _Test] = ("text", lambda value: isinstance(value, str))
_TRUTH: tuple[str, _Test] = ("true or false", lambda value: isinstance(value, bool))
_TEXT_OR_NULL: tuple[str, _Test] = ("text or null", lambda value: value is None or isinstance(value, str))
_TEXTS_OR_NULL: tuple[str, _Test] = ("a list of texts or null", lambda value: value is None or _is_texts(value))
