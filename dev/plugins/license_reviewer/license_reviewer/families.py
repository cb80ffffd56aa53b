"""How far a license reaches, judged from its expression.

The categories of single licenses come from ScanCode's index, which `license-expression` ships; no judgement of ours is
in it but the list of network licenses.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from typing import Any, Literal

from license_expression import (
    AND,
    OR,
    ExpressionError,
    LicenseSymbol,
    LicenseWithExceptionSymbol,
    Licensing,
    build_spdx_licensing,
    get_license_index,
)


class Family(StrEnum):
    """What a license asks of those who pass the component on; later members ask for more."""

    PUBLIC_DOMAIN = "public-domain"  #: nothing
    PERMISSIVE = "permissive"  #: keep the notices
    WEAK = "copyleft-weak"  #: publish changes to the component itself
    STRONG = "copyleft-strong"  #: publish the whole work under the same license
    NETWORK = "copyleft-network"  #: the same, already when users reach the work over a network
    RESTRICTED = "restricted"  #: some uses are forbidden


#: Licenses that name only a family. They have no SPDX identifier, so they get a reference of their own.
UNSPECIFIED = {
    "LicenseRef-Apache-unspecified": "Permissive",
    "LicenseRef-Artistic-unspecified": "Copyleft Limited",
    "LicenseRef-BSD-unspecified": "Permissive",
    "LicenseRef-Public-Domain": "Public Domain",
    "LicenseRef-ZPL-unspecified": "Permissive",
}

_CATEGORIES = {
    "Public Domain": Family.PUBLIC_DOMAIN,
    "Permissive": Family.PERMISSIVE,
    "Copyleft Limited": Family.WEAK,
    "Copyleft": Family.STRONG,
}
_NETWORK = ("AGPL-", "CPAL-", "OSL-", "RPL-", "SSPL-")
_ORDER = list(Family)


def parse(text: str) -> Any | None:
    """Return the expression, its identifiers spelled as SPDX does, or None when one is unknown or the syntax wrong."""
    try:
        return _licensing()[0].parse(text, validate=True, strict=True)
    except ExpressionError:
        return None


def combine(expressions: Sequence[str], operator: Literal["AND", "OR"]) -> Any:
    """Return one simplified expression of several valid ones."""
    joined = f" {operator} ".join(f"({expression})" for expression in expressions)
    return _licensing()[0].parse(joined, validate=True, strict=True).simplify()


def family(expression: Any) -> Family:
    """Return the family: the strictest where all licenses hold, the mildest where one may be chosen."""
    if isinstance(expression, OR):
        return min((family(part) for part in expression.args), key=_ORDER.index)
    if isinstance(expression, AND):
        return max((family(part) for part in expression.args), key=_ORDER.index)
    if isinstance(expression, LicenseWithExceptionSymbol):
        return _with_exception(family(expression.license_symbol), expression.exception_symbol)
    return _family_of(expression.key)


def _with_exception(base: Family, exception: LicenseSymbol) -> Family:
    """Exceptions such as Classpath's let other works link to the component: what is left is weak."""
    limits = _licensing()[1].get(exception.key) == "Copyleft Limited"
    return Family.WEAK if base is Family.STRONG and limits else base


def _family_of(key: str) -> Family:
    if key.startswith(_NETWORK):
        return Family.NETWORK
    return _CATEGORIES.get(_licensing()[1].get(key, ""), Family.RESTRICTED)


@cache
def _licensing() -> tuple[Licensing, dict[str, str]]:
    """Return the parser and the category of every identifier it knows."""
    index = get_license_index()
    index += [
        {
            "license_key": key.lower(),
            "spdx_license_key": key,
            "other_spdx_license_keys": [],
            "category": category,
            "is_exception": False,
            "is_deprecated": False,
        }
        for key, category in UNSPECIFIED.items()
    ]
    categories = {one["spdx_license_key"]: one["category"] for one in index if one.get("spdx_license_key")}
    return build_spdx_licensing(index), categories
