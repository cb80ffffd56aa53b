"""Manifest 2.0: one JSON file per installed plugin. Reading one checks every type and lists every violation.

One of version 1.0 is read too, and is of version 2.0 when it is written again. A manifest that breaks a rule is never
half-used: `load_manifest` raises a `ManifestError` that names all of them.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, TypeVar, get_type_hints

from plugin_substrate.declarations import parse_taxonomy, parse_worker_env
from plugin_substrate.errors import ManifestError, PluginConfigError
from plugin_substrate.hashing import hash_dict_canonical
from plugin_substrate.legacy_manifest import LEGACY_VERSION, upgraded
from plugin_substrate.manifest_sections import CodeSection, DriftSection, InstallSection
from plugin_substrate.requirements import ResourceRequirements, parse_requirements
from plugin_substrate.worker.isolation import (
    IsolationProfile,
    IsolationTerms,
    parse_required_layers,
    parse_terms,
    resolve_profile,
)

__all__ = [
    "CAPABILITY_PATTERN",
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "NAME_PATTERN",
    "CodeSection",
    "DriftSection",
    "InstallSection",
    "ManifestV2",
    "compute_config_schema_hash",
    "load_manifest",
    "manifest_to_dict",
    "parse_manifest",
    "parse_strict_json",
    "write_manifest",
]

FORMAT_VERSION = "2.0"
MAX_MANIFEST_BYTES = 1 << 20

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
CAPABILITY_PATTERN = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z][a-z0-9_-]*)+")
_MODULE_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_CLASS_PATTERN = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_VARIABLE_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True, kw_only=True)
class ManifestV2:
    """A valid manifest. ``overrides`` is the operator's: ``isolation`` grants, ``require`` names needed layers.

    ``stateless: false`` there gives each tenant a worker of its own, whatever the plugin says of itself, and
    ``preload: false`` has each worker import the plugin itself.

    ``format_version`` is what the file was read as; it is always written as 2.0.
    """

    install: InstallSection
    code: CodeSection
    drift_tracking: DriftSection = field(default_factory=DriftSection)
    overrides: dict[str, Any] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION

    @cached_property
    def resources(self) -> ResourceRequirements:
        """What the plugin needs of the machine; a `ManifestError` when it cannot be read."""
        return _no_problems(parse_requirements, self.code.resources, "code.resources")

    @property
    def preload(self) -> bool:
        """Whether workers are copies of a template: the plugin asks for it, and the operator does not object."""
        return self.code.preload and bool(self.overrides.get("preload", True))

    @property
    def asked_isolation(self) -> IsolationTerms:
        """What the plugin asks for; a `ManifestError` when it cannot be read."""
        return _no_problems(parse_terms, self.code.isolation or {}, "code.isolation")

    @property
    def granted_isolation(self) -> IsolationTerms:
        """What the operator grants; a `ManifestError` when it cannot be read."""
        return _no_problems(parse_terms, self.overrides.get("isolation", {}), "overrides.isolation")

    @property
    def required_layers(self) -> tuple[str, ...]:
        """The layers without which the operator does not want it to run; a `ManifestError` when they cannot be read."""
        return _no_problems(parse_required_layers, self.overrides.get("require", []), "overrides.require")

    def isolation_profile(self, default: IsolationProfile) -> IsolationProfile:
        """Return what the plugin may do; a `PluginConfigError` when it asks for more than it is granted.

        It cannot have both processes and a template: only the supervisor, which makes no copies of foreign code, can
        start a worker whose processes certainly end with it.

        Where its code lies outside its environment it may read that too: the installer knew, not the plugin.
        """
        profile = resolve_profile(self.code.name, self.asked_isolation, self.granted_isolation, default)
        if self.preload and profile.processes:
            raise PluginConfigError(
                f"plugin {self.code.name!r} cannot have isolation.processes ({profile.processes}) together with "
                "preload; write `preload: false` under its manifest's `overrides`, or grant `processes: 0`",
                fields_invalid=["preload", "isolation.processes"],
            )
        return replace(profile, read_paths=(*profile.read_paths, *self.install.source_paths))


def compute_config_schema_hash(schema: Mapping[str, Any] | None) -> str:
    """Return ``sha256:<hex>`` of the schema with sorted keys and no spaces; a missing schema counts as ``{}``."""
    return hash_dict_canonical(schema)


def load_manifest(path: Path) -> ManifestV2:
    """Read and check one file; anything wrong with it is one `ManifestError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError([f"cannot be read: {error.strerror}"], source=str(path)) from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError([f"is larger than {MAX_MANIFEST_BYTES} bytes"], source=str(path))
    try:
        data = parse_strict_json(raw)
    except ValueError as error:
        raise ManifestError([f"is not JSON in UTF-8: {error}"], source=str(path)) from error
    return parse_manifest(data, source=str(path))


def parse_strict_json(raw: bytes) -> Any:
    """Return a JSON value in UTF-8 with finite numbers, distinct keys and sane nesting; a ValueError for all else."""
    try:
        return json.loads(raw.decode(), parse_constant=_finite, parse_float=_finite, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def parse_manifest(data: object, *, source: str = "") -> ManifestV2:
    """Turn a decoded JSON value into a manifest, or raise a `ManifestError` with every violation."""
    if not isinstance(data, dict):
        raise ManifestError(["the top level must be an object"], source=source)
    problems: list[str] = []
    version = data.get("format_version", LEGACY_VERSION)
    if "format_version" not in data:
        data = upgraded(data, problems)
    elif version != FORMAT_VERSION:
        raise ManifestError([f'format_version must be the text "{FORMAT_VERSION}", not {version!r}'], source=source)
    sections = {"format_version", "install", "code", "drift_tracking", "overrides"}
    problems += [f"unknown key {key!r}" for key in data if key not in sections]
    values = {name: _checked(data, name, kind, problems) for name, kind in _SECTIONS.items()}
    overrides = data.get("overrides", {})
    if not isinstance(overrides, dict):
        problems.append(f"overrides must be an object, not {overrides!r}")
    else:
        parse_terms(overrides.get("isolation", {}), "overrides.isolation", problems)
        parse_required_layers(overrides.get("require", []), "overrides.require", problems)
        for key in ("stateless", "preload"):
            if not isinstance(overrides.get(key, False), bool):
                problems.append(f"overrides.{key} must be true or false, not {overrides[key]!r:.80}")
        category = overrides.get("category_override", "")
        if not isinstance(category, str) or not category.isprintable():
            problems.append(f"overrides.category_override must be one printable line, not {category!r:.80}")
    if not problems:
        problems += _rules(values["install"], values["code"], values["drift_tracking"])
    if problems:
        raise ManifestError(problems, source=source)
    return ManifestV2(
        install=InstallSection(**values["install"]),
        code=CodeSection(**values["code"]),
        drift_tracking=DriftSection(**values["drift_tracking"]),
        overrides=overrides,
        format_version=version,
    )


def manifest_to_dict(manifest: ManifestV2) -> dict[str, Any]:
    """Return the manifest as it stands in its file; what is empty is left out of ``install`` and ``code``."""
    code = {("class" if key == "class_name" else key): value for key, value in _set_fields(manifest.code).items()}
    return {
        "format_version": FORMAT_VERSION,
        "install": _set_fields(manifest.install),
        "code": code,
        "drift_tracking": {"config_schema_hash": manifest.drift_tracking.config_schema_hash},
        "overrides": manifest.overrides,
    }


def write_manifest(path: Path, manifest: ManifestV2) -> None:
    """Write the file in one step: a reader sees the old content or the new, never a part."""
    text = json.dumps(manifest_to_dict(manifest), indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


_SECTIONS: dict[str, type] = {"install": InstallSection, "code": CodeSection, "drift_tracking": DriftSection}
_REQUIRED = {
    "install": ("python_path",),
    "code": ("name", "version", "description", "module", "class", "interface"),
    "drift_tracking": (),
}


def _checked(data: dict[str, Any], name: str, kind: type, problems: list[str]) -> dict[str, Any]:
    """Check keys and types of one section and return keyword arguments for its class."""
    section = data.get(name, {})
    if not isinstance(section, dict):
        problems.append(f"{name} must be an object, not {section!r}")
        return {}
    hints = {("class" if key == "class_name" else key): hint for key, hint in get_type_hints(kind).items()}
    problems += [f"unknown key {f'{name}.{key}'!r}" for key in section if key not in hints]
    problems += [f"{name}.{key} is missing" for key in _REQUIRED[name] if key not in section]
    values: dict[str, Any] = {}
    for key, hint in hints.items():
        if key not in section:
            continue
        wanted, value = _convert(hint, section[key])
        if wanted:
            problems.append(f"{name}.{key} must be {wanted}, not {section[key]!r}")
        elif key in _REQUIRED[name] and not value.strip():
            problems.append(f"{name}.{key} must not be empty")
        values["class_name" if key == "class" else key] = value
    return values


def _convert(hint: Any, value: Any) -> tuple[str, Any]:
    """Return what was wanted when ``value`` does not fit ``hint`` (else an empty text), and the value to store."""
    if hint is str:
        return ("" if isinstance(value, str) else "text"), value
    if hint is bool:
        return ("" if isinstance(value, bool) else "true or false"), value
    if hint == str | None:
        return ("" if value is None or isinstance(value, str) else "text or null"), value
    if hint == dict[str, str]:
        fits = isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
        return ("" if fits else "an object of texts"), value
    if hint == tuple[str, ...]:
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return ("" if fits else "a list of texts"), tuple(value) if fits else value
    if hint == tuple[dict[str, Any], ...]:
        fits = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        return ("" if fits else "a list of objects"), tuple(value) if fits else value
    return ("" if value is None or isinstance(value, dict) else "an object"), value


def _rules(install: dict[str, Any], code: dict[str, Any], drift: dict[str, Any]) -> list[str]:
    """Return the rules that well-typed sections still break."""
    problems = []
    if not PurePath(install["python_path"]).is_absolute():
        problems.append(f"install.python_path must be absolute, not {install['python_path']!r}")
    for variable, value in install.get("env_vars", {}).items():
        if not _VARIABLE_PATTERN.fullmatch(variable) or "\0" in value:
            problems.append(f"install.env_vars has an impossible variable {variable!r}")
    patterns = (
        ("name", NAME_PATTERN, "1 to 64 letters, digits, - or _"),
        ("module", _MODULE_PATTERN, "a dotted module name"),
        ("class_name", _CLASS_PATTERN, "a class name"),
    )
    for key, pattern, wanted in patterns:
        if not pattern.fullmatch(code[key]):
            problems.append(f"code.{key.removesuffix('_name')} must be {wanted}, not {code[key]!r}")
    unfit = [key for key in ("version", "description") if not code[key].isprintable()]
    problems += [f"code.{key} must be one printable line, not {code[key]!r:.80}" for key in unfit]
    if "." not in code["interface"]:
        problems.append(f"code.interface must be a dotted name, not {code['interface']!r}")
    taxonomy = parse_taxonomy(code.get("taxonomy") or {}, "code.taxonomy", problems)
    parse_worker_env(code.get("worker_env", ()), "code.worker_env", problems)
    if taxonomy.interface_fqcn not in ("", code["interface"]):
        problems.append("code.taxonomy.interface_fqcn must equal code.interface")
    capabilities = code.get("capabilities", ())
    wrong = [capability for capability in capabilities if not CAPABILITY_PATTERN.fullmatch(capability)]
    problems += [f"code.capabilities: {capability!r} is not like 'bom.read'" for capability in wrong]
    if len(set(capabilities)) != len(capabilities):
        problems.append("code.capabilities names one capability twice")
    parse_terms({"read_paths": list(install.get("source_paths", ()))}, "install.source_paths", problems)
    parse_terms(code.get("isolation") or {}, "code.isolation", problems)
    parse_requirements(code.get("resources"), "code.resources", problems)
    stored = drift.get("config_schema_hash")
    if stored is not None and not re.fullmatch(r"sha256:[0-9a-f]{64}", stored):
        problems.append(f"drift_tracking.config_schema_hash must look like 'sha256:<64 hex digits>', not {stored!r}")
    return problems


def _no_problems(parse: Callable[[Any, str, list[str]], _Parsed], data: object, place: str) -> _Parsed:
    problems: list[str] = []
    parsed = parse(data, place, problems)
    if problems:
        raise ManifestError(problems)
    return parsed


def _set_fields(section: Any) -> dict[str, Any]:
    values = {key: value for key, value in vars(section).items() if value not in ("", None, (), {})}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a JSON number")
    return number


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result
