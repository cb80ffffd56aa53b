"""What the review finds, how grave it is, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from license_reviewer.families import Family
from license_reviewer.reading import ListMeaning, Reading


class Severity(StrEnum):
    """How urgent a finding is; earlier members are graver."""

    HIGH = "high"  #: stop using the component until it is settled
    MEDIUM = "medium"  #: settle before the product is delivered
    LOW = "low"  #: know about it


class Kind(StrEnum):
    """What was found; the order is the order of the report."""

    NONCOMPLIANT = "noncompliant"
    NETWORK = "copyleft-network"
    STRONG = "copyleft-strong"
    WEAK = "copyleft-weak"
    RESTRICTED = "restricted"
    UNKNOWN = "unknown"
    MISSING = "missing"
    SEVERAL_VERSIONS = "several-versions"
    IMPRECISE = "imprecise"


DEFAULT_SEVERITIES: Mapping[Kind, Severity] = {
    Kind.NONCOMPLIANT: Severity.HIGH,
    Kind.NETWORK: Severity.HIGH,
    Kind.STRONG: Severity.HIGH,
    Kind.WEAK: Severity.MEDIUM,
    Kind.RESTRICTED: Severity.MEDIUM,
    Kind.UNKNOWN: Severity.MEDIUM,
    Kind.MISSING: Severity.MEDIUM,
    Kind.SEVERAL_VERSIONS: Severity.MEDIUM,
    Kind.IMPRECISE: Severity.LOW,
}
MILDER = {Severity.HIGH: Severity.MEDIUM, Severity.MEDIUM: Severity.LOW, Severity.LOW: Severity.LOW}

_REASONS = {
    Family.NETWORK: "users who reach the product over a network are owed its whole source",
    Family.STRONG: "passing the product on under other terms is not allowed: the whole work falls under this license",
    Family.WEAK: "changes to the component itself must be published under this license",
    Family.RESTRICTED: "the license forbids some uses",
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What may be tuned: the severity of each kind, the severity that blocks, and what a list of licenses means."""

    severities: Mapping[Kind, Severity] = field(default_factory=lambda: DEFAULT_SEVERITIES)
    block_at: Severity = Severity.HIGH
    list_means: ListMeaning = ListMeaning.ALL

    def blocks(self, severity: Severity) -> bool:
        """Tell whether a finding of this severity puts its component on the blocking list."""
        order = list(Severity)
        return order.index(severity) <= order.index(self.block_at)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A component as the review needs it; components with the same ``family_key`` are versions of one thing."""

    name: str
    version: str
    family_key: str
    licenses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding about one component, with its reason in words."""

    component: str
    version: str
    kind: Kind
    severity: Severity
    detail: str
    license: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the finding as it stands in the output."""
        return {key: str(value) for key, value in vars(self).items()}

    def order(self) -> tuple[int, int, str, str]:
        """Return the key by which findings are listed: gravest first, then by kind and name."""
        return list(Severity).index(self.severity), list(Kind).index(self.kind), self.component.casefold(), self.version


def license_findings(part: Part, reading: Reading, policy: Policy) -> Iterator[Finding]:
    """Yield what is wrong with the licenses of one component."""

    def finding(kind: Kind, detail: str, *, milder: bool = False) -> Finding:
        severity = policy.severities[kind]
        return Finding(
            component=part.name,
            version=part.version,
            kind=kind,
            severity=MILDER[severity] if milder else severity,
            detail=detail,
            license=reading.expression or "; ".join(part.licenses),
        )

    for text in reading.denied:
        yield finding(Kind.NONCOMPLIANT, f"the bill states {text!r}")
    if reading.unknown:
        listed = ", ".join(repr(text) for text in reading.unknown)
        yield finding(Kind.UNKNOWN, f"no known license is called {listed}: read it and record its SPDX identifier")
    elif reading.expression is None and not reading.marks_only:
        yield finding(Kind.MISSING, "neither a license nor compliance is stated: ask the supplier")
    if reading.family in _REASONS:
        unsure = reading.if_choice is not reading.family
        kind = Kind(reading.family.value)
        detail = _REASONS[reading.family]
        if unsure:
            detail += f"; the bill lists several without saying whether one may be chosen (then: {reading.if_choice})"
        yield finding(kind, detail, milder=unsure)
    if reading.imprecise:
        listed = ", ".join(repr(text) for text in reading.imprecise)
        yield finding(Kind.IMPRECISE, f"{listed} names no version or variant: record the exact license")


def version_finding(parts: list[Part], policy: Policy) -> Finding | None:
    """Return a finding when one thing is in the bill in several versions; milder within one major version."""
    versions = sorted({part.version for part in parts if part.version})
    if len(versions) < 2:
        return None
    majors = {version.split(".")[0] for version in versions}
    severity = policy.severities[Kind.SEVERAL_VERSIONS]
    return Finding(
        component=parts[0].name,
        version=", ".join(versions),
        kind=Kind.SEVERAL_VERSIONS,
        severity=severity if len(majors) > 1 else MILDER[severity],
        detail=f"{len(versions)} versions are in use: settle on one, or a fix in one will be missed in the other",
    )
