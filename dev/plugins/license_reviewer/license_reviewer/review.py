"""The whole review: every component is read, findings are collected, counted and put in a fixed order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from license_reviewer.findings import Finding, Kind, Part, Policy, license_findings, version_finding
from license_reviewer.reading import Reading, read_licenses


def review(parts: Sequence[Part], policy: Policy, tick: Callable[[int, Part], None]) -> dict[str, Any]:
    """Return the review; the same bill and policy give the same result. ``tick`` is called before each component."""
    findings: list[Finding] = []
    readings: list[Reading] = []
    for index, part in enumerate(parts):
        tick(index, part)
        reading = read_licenses(part.licenses, policy.list_means)
        readings.append(reading)
        findings += license_findings(part, reading, policy)
    findings += _version_findings(parts, policy)
    findings = sorted(set(findings), key=Finding.order)
    blocking = _blocking(findings, policy)
    expressions = Counter(reading.expression for reading in readings if reading.expression)
    return {
        "findings": [finding.as_json() for finding in findings],
        "summary": {
            "components": len(parts),
            "findings": len(findings),
            "blocking": len(blocking),
            "by_kind": _counts(finding.kind for finding in findings),
            "by_severity": _counts(finding.severity for finding in findings),
            "by_family": _counts(map(_family_name, readings)),
        },
        "blocking": blocking,
        "licenses": dict(sorted(expressions.items(), key=lambda item: (-item[1], item[0]))),
    }


def _version_findings(parts: Sequence[Part], policy: Policy) -> list[Finding]:
    same: dict[str, list[Part]] = {}
    for part in parts:
        same.setdefault(part.family_key, []).append(part)
    found = (version_finding(group, policy) for group in same.values())
    return [finding for finding in found if finding]


def _blocking(findings: Sequence[Finding], policy: Policy) -> list[dict[str, str]]:
    """Return the components to stop using, each once; two versions of a thing are a reason to choose, not to stop."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        if policy.blocks(finding.severity) and finding.kind is not Kind.SEVERAL_VERSIONS:
            reason = f"{finding.kind.value}: {finding.license}"
            reasons.setdefault((finding.component, finding.version), []).append(reason)
    return [
        {"component": component, "version": version, "reason": "; ".join(said)}
        for (component, version), said in sorted(reasons.items(), key=lambda item: (item[0][0].casefold(), item[0][1]))
    ]


def _family_name(reading: Reading) -> str:
    if reading.family:
        return reading.family.value
    if reading.unknown:
        return Kind.UNKNOWN.value
    return "compliance-mark" if reading.marks_only else Kind.MISSING.value


def _counts(values: Any) -> dict[str, int]:
    counted = Counter(str(value) for value in values)
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
