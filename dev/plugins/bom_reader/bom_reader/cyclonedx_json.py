"""CycloneDX JSON, specification 1.2 to 1.7, checked against the schemas that the CycloneDX project ships.

Only what is used is checked (name, version, purl, supplier, licenses): a bill with, say, a malformed link is still
worth reading, and checking every link takes a hundred times longer than all the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from plugin_substrate.errors import PluginInputError

from bom_reader.bill import MAX_TEXT, BadRow, Bill, Component, clean

MAX_DEPTH = 32

_TEXTS = ("type", "bom-ref", "group", "name", "version", "purl", "publisher")


def read_cyclonedx(name: str, text: str, check_cancel: Callable[[], None]) -> Bill:
    """Read a bill; nested components are listed after the one that holds them.

    A file that is no CycloneDX document is a PluginInputError. A component that breaks the schema is a bad row, and is
    kept when it has a name.
    """
    document = _document(name, text)
    version = document["specVersion"]
    found = list(_flatten(document.get("components", []), "components", 0))
    bill = Bill(file_name=clean(name), format="cyclonedx-json", spec_version=version)
    reasons = _violations(version, [_projection(value) for _, value in found], name)
    for index, (path, value) in enumerate(found):
        check_cancel()
        problems = reasons.get(index, [])
        try:
            component = _component(path, value)
        except ValueError as error:
            problems = [*problems, str(error)]
            component = None
        if component:
            bill.components.append(component)
        bill.bad_rows += [BadRow(where=path, reason=reason, kept=component is not None) for reason in problems]
    return bill


def _document(name: str, text: str) -> dict[str, Any]:
    """Return the decoded document after the checks without which nothing else makes sense."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(f"{name} starts like JSON but is not: {error}") from error
    if not isinstance(document, dict):
        raise _refused(f"{name} holds no JSON object: a CycloneDX document starts with {{")
    if "spdxVersion" in document:
        raise _refused(f"{name} is an SPDX document: convert it to CycloneDX JSON")
    if document.get("bomFormat") != "CycloneDX":
        raise _refused(f'{name} has bomFormat {document.get("bomFormat")!r:.60}, not "CycloneDX"')
    if not isinstance(document.get("specVersion"), str):
        raise _refused(f"{name} has no specVersion: it must be one of 1.2 to 1.7")
    if not isinstance(document.get("components", []), list):
        raise _refused(f"{name}: components must be a list")
    return document


def _flatten(components: list[Any], path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise _refused(f"{path}: components stand more than {MAX_DEPTH} deep in each other")
    for index, value in enumerate(components):
        here = f"{path}[{index}]"
        yield here, value
        nested = value.get("components") if isinstance(value, dict) else None
        if isinstance(nested, list):
            yield from _flatten(nested, f"{here}.components", depth + 1)


def _projection(value: Any) -> Any:
    """Return the part of a component that is used, and nothing else."""
    if not isinstance(value, dict):
        return value
    part = {key: value[key] for key in _TEXTS if key in value}
    supplier = value.get("supplier")
    if supplier is not None:
        has_name = isinstance(supplier, dict) and "name" in supplier
        part["supplier"] = {"name": supplier["name"]} if has_name else ({} if isinstance(supplier, dict) else supplier)
    licenses = value.get("licenses")
    if licenses is not None:
        part["licenses"] = [_license_part(one) for one in licenses] if isinstance(licenses, list) else licenses
    return part


def _license_part(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("license"), dict):
        return {"license": {key: value["license"][key] for key in ("id", "name") if key in value["license"]}}
    return {key: value[key] for key in ("license", "expression") if key in value}


def _violations(version: str, components: list[Any], name: str) -> dict[int, list[str]]:
    """Return what the schema finds, by index of the component. The imports take a second, so CSV does without."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonValidator
    from jsonschema.exceptions import best_match

    try:
        schema = SchemaVersion.from_version(version)
        validator = JsonValidator(schema)
        part = {"bomFormat": "CycloneDX", "specVersion": version, "version": 1, "components": components}
        errors = list(validator.validate_str(json.dumps(part), all_errors=True) or ())
    except (KeyError, ValueError, NotImplementedError) as error:
        raise _refused(f"{name} has specVersion {version!r:.20}: it must be one of 1.2 to 1.7") from error
    reasons: dict[int, list[str]] = {}
    for found in (one.data for one in errors):
        place = list(found.absolute_path)
        if found.validator == "uniqueItems":
            continue  # components may differ only in what is not looked at
        deepest = best_match(iter([found]))
        field = ".".join(str(step) for step in list(deepest.absolute_path)[2:])
        reasons.setdefault(place[1], []).append(_shorten(f"{field}: {deepest.message}" if field else deepest.message))
    return reasons


def _shorten(message: str) -> str:
    printable = clean(message[:180])
    return printable if len(message) <= 180 else printable + " …"


def _component(path: str, value: Any) -> Component:
    """Build the component from the parts that have the right type; a ValueError when nothing is left to name it."""
    value = value if isinstance(value, dict) else {}
    name = clean(value.get("name"))
    if not name:
        raise ValueError("the component has no name")
    group = clean(value.get("group"))
    supplier = value.get("supplier")
    return Component(
        ref=clean(value.get("bom-ref")) or path,
        name=f"{group}/{name}" if group else name,
        description=_description(value.get("description")),
        version=clean(value.get("version")),
        purl=clean(value.get("purl")),
        supplier=clean(supplier.get("name")) if isinstance(supplier, dict) else clean(value.get("publisher")),
        licenses=tuple(_licenses(value.get("licenses"))),
    )


def _description(value: Any) -> str:
    """Return the start of a text that may be long, as nothing depends on it."""
    return clean(value[:MAX_TEXT]) if isinstance(value, str) else ""


def _licenses(values: Any) -> Iterator[str]:
    for value in values if isinstance(values, list) else ():
        if not isinstance(value, dict):
            continue
        stated = value.get("license")
        named = (stated.get("id") or stated.get("name")) if isinstance(stated, dict) else None
        text = clean(value.get("expression") or named)
        if text:
            yield text


def _refused(message: str) -> PluginInputError:
    return PluginInputError(message, fields_invalid=["bom"])
