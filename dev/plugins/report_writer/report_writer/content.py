"""From the arguments of a call to what a report shows; whatever does not fit is named by its path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plugin_substrate.errors import PluginInputError

MAX_ROWS = 50_000
MAX_TEXT = 4_000
SEVERITIES = ("high", "medium", "low")

_LABEL = re.compile(r"[a-z][a-z0-9-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the findings table."""

    component: str
    version: str
    kind: str
    severity: str
    detail: str
    license: str


@dataclass(frozen=True, kw_only=True)
class Blocked:
    """One component to stop using."""

    component: str
    version: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a report shows."""

    title: str
    facts: dict[str, str]
    mapping: dict[str, str]
    bad_rows: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    blocking: tuple[Blocked, ...]
    families: dict[str, int]
    licenses: dict[str, int]

    def count(self, severity: str) -> int:
        """Return how many findings have this severity."""
        return sum(finding.severity == severity for finding in self.findings)


def content_of(title: Any, bill: Any, review: Any) -> Content:
    """Check the outputs of `bom.read` and `bom.review`; a PluginInputError names the first value that does not fit."""
    bill, review = _object("bill", bill), _object("review", review)
    summary = _object("review.summary", review.get("summary"))
    return Content(
        title=_text("title", title, empty=False),
        facts=_facts(bill),
        mapping={field: _text(f"bill.column_mapping.{field}", header) for field, header in _columns(bill)},
        bad_rows=tuple(
            (str(row.get("line") or row.get("path") or ""), _text(f"{path}.reason", row.get("reason")))
            for path, row in _rows("bill.bad_rows", bill.get("bad_rows", []))
        ),
        findings=tuple(_finding(path, row) for path, row in _rows("review.findings", review.get("findings"))),
        blocking=blocking_of("review.blocking", review.get("blocking")),
        families=_counts("review.summary.by_family", summary.get("by_family"), label=True),
        licenses=_counts("review.licenses", review.get("licenses")),
    )


def blocking_of(path: str, value: Any) -> tuple[Blocked, ...]:
    """Return the components to stop using; a PluginInputError names the first entry that does not fit."""
    return tuple(
        Blocked(
            component=_text(f"{here}.component", row.get("component"), empty=False),
            version=_text(f"{here}.version", row.get("version", "")),
            reason=_text(f"{here}.reason", row.get("reason"), empty=False),
        )
        for here, row in _rows(path, value)
    )


def _facts(bill: Mapping[str, Any]) -> dict[str, str]:
    named = {"File": "file_name", "Format": "format", "Specification": "spec_version", "Components": "component_count"}
    facts = {label: bill.get(key) for label, key in named.items()}
    return {label: _text(f"bill.{named[label]}", str(value)) for label, value in facts.items() if value is not None}


def _columns(bill: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(_object("bill.column_mapping", bill.get("column_mapping") or {}).items())


def _finding(path: str, row: Mapping[str, Any]) -> Finding:
    severity, kind = row.get("severity"), row.get("kind")
    if severity not in SEVERITIES:
        raise wrong(f"{path}.severity", f"must be one of {', '.join(SEVERITIES)}")
    return Finding(
        component=_text(f"{path}.component", row.get("component"), empty=False),
        version=_text(f"{path}.version", row.get("version", "")),
        kind=_label(f"{path}.kind", kind),
        severity=severity,
        detail=_text(f"{path}.detail", row.get("detail")),
        license=_text(f"{path}.license", row.get("license", "")),
    )


def _rows(path: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, list) or len(value) > MAX_ROWS:
        raise wrong(path, f"must be a list of up to {MAX_ROWS} objects")
    for index, row in enumerate(value):
        yield f"{path}[{index}]", _object(f"{path}[{index}]", row)


def _counts(path: str, value: Any, *, label: bool = False) -> dict[str, int]:
    counts = _object(path, value)
    for key, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise wrong(f"{path}.{key}", "must be a number of 0 or more")
        if label:
            _label(f"{path}.{key}", key)
    return dict(counts)


def _object(path: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong(path, "must be an object")
    return value


def _label(path: str, value: Any) -> str:
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise wrong(path, "must be a word of lower-case letters, digits and hyphens")
    return value


def _text(path: str, value: Any, *, empty: bool = True) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not (value or empty):
        raise wrong(path, f"must be a text of {0 if empty else 1} to {MAX_TEXT} characters")
    return value


def wrong(path: str, rule: str) -> PluginInputError:
    """Return the error that names an argument and its rule."""
    return PluginInputError(f"{path} {rule}", fields_invalid=[path])
