"""From the arguments of a call to checked values; what does not fit is named by its path."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from plugin_substrate.errors import PluginInputError

from license_reviewer.findings import DEFAULT_SEVERITIES, Kind, Part, Policy, Severity
from license_reviewer.reading import ListMeaning

MAX_COMPONENTS = 50_000
MAX_TEXT = 500

Member = TypeVar("Member", bound=StrEnum)


def parts_of(components: Any) -> list[Part]:
    """Return the components; a PluginInputError names the first that is not as `bom.read` gives it."""
    if not isinstance(components, list) or not 0 < len(components) <= MAX_COMPONENTS:
        raise _wrong("components", f"must be a list of 1 to {MAX_COMPONENTS} components")
    return [_part(f"components[{index}]", value) for index, value in enumerate(components)]


def policy_of(severities: Any, block_at: Any, list_means: Any) -> Policy:
    """Return the policy; a PluginInputError lists the values that are allowed."""
    if not isinstance(severities, Mapping):
        raise _wrong("severities", "must be an object of kinds and severities")
    chosen = {
        _member(Kind, "severities", key): _member(Severity, f"severities.{key}", severities[key]) for key in severities
    }
    return Policy(
        severities={**DEFAULT_SEVERITIES, **chosen},
        block_at=_member(Severity, "block_at", block_at),
        list_means=_member(ListMeaning, "list_means", list_means),
    )


def _part(path: str, value: Any) -> Part:
    if not isinstance(value, Mapping):
        raise _wrong(path, "must be an object")
    name = _text(path, value, "name")
    if not name:
        raise _wrong(f"{path}.name", "must not be empty")
    licenses = value.get("licenses") or []
    if not isinstance(licenses, list) or not all(isinstance(one, str) and len(one) <= MAX_TEXT for one in licenses):
        raise _wrong(f"{path}.licenses", f"must be a list of texts of up to {MAX_TEXT} characters")
    purl = _text(path, value, "purl")
    return Part(
        name=name,
        version=_text(path, value, "version"),
        family_key=_without_version(purl) if purl else name.casefold(),
        licenses=tuple(licenses),
    )


def _without_version(purl: str) -> str:
    """Return a package URL up to its version: ``pkg:pypi/six@1.17.0?x=y`` without all from the ``@`` on."""
    return purl.split("?", maxsplit=1)[0].split("#", maxsplit=1)[0].rsplit("@", 1)[0]


def _text(path: str, value: Mapping[str, Any], key: str) -> str:
    text = value.get(key) or ""
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise _wrong(f"{path}.{key}", f"must be a text of up to {MAX_TEXT} characters")
    return text


def _member(kind: type[Member], path: str, value: Any) -> Member:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise _wrong(path, f"must be one of {allowed}, not {value!r:.60}") from None


def _wrong(path: str, rule: str) -> PluginInputError:
    return PluginInputError(f"{path} {rule}", fields_invalid=[path])
