"""The names that licenses go by outside SPDX: trove classifiers, abbreviations, and words about compliance."""

from __future__ import annotations

import re

_FILLER = {"the", "license", "licence", "licenses", "version", "v", "software", "free", "gnu", "open", "source"}
_GNU_WORDS = {"affero", "agpl", "general", "gpl", "later", "lesser", "lgpl", "library", "only", "or", "public"}
_GNU_OLDEST = {"GPL": "1.0", "LGPL": "2.0", "AGPL": "3.0"}

#: Keys are written as `_words` leaves them: lower case, no filler, no brackets, 2.0 as 2.
_NAMES = {
    "apache": "LicenseRef-Apache-unspecified",
    "apache 1.1": "Apache-1.1",
    "apache 2": "Apache-2.0",
    "artistic": "LicenseRef-Artistic-unspecified",
    "artistic 2": "Artistic-2.0",
    "asl 2": "Apache-2.0",
    "boost 1": "BSL-1.0",
    "boost 1 bsl 1": "BSL-1.0",
    "bsd": "LicenseRef-BSD-unspecified",
    "2 clause bsd": "BSD-2-Clause",
    "3 clause bsd": "BSD-3-Clause",
    "bsd 2 clause": "BSD-2-Clause",
    "bsd 3 clause": "BSD-3-Clause",
    "cc 0 1 universal cc 0 1 public domain dedication": "CC0-1.0",
    "common development and distribution 1 cddl 1": "CDDL-1.0",
    "eclipse public 1 epl 1": "EPL-1.0",
    "eclipse public 2 epl 2": "EPL-2.0",
    "european union public 1.2 eupl 1.2": "EUPL-1.2",
    "expat": "MIT",
    "historical permission notice and disclaimer hpnd": "HPND",
    "isc": "ISC",
    "isc iscl": "ISC",
    "mit": "MIT",
    "mit no attribution mit 0": "MIT-0",
    "modified bsd": "BSD-3-Clause",
    "mozilla public 1.1 mpl 1.1": "MPL-1.1",
    "mozilla public 2 mpl 2": "MPL-2.0",
    "mpl 1.1": "MPL-1.1",
    "mpl 2": "MPL-2.0",
    "new bsd": "BSD-3-Clause",
    "postgresql": "PostgreSQL",
    "psf": "PSF-2.0",
    "psfl": "PSF-2.0",
    "public domain": "LicenseRef-Public-Domain",
    "python foundation": "PSF-2.0",
    "simplified bsd": "BSD-2-Clause",
    "unlicense": "Unlicense",
    "unlicense unlicense": "Unlicense",
    "university of illinois ncsa": "NCSA",
    "zlib": "Zlib",
    "zlib libpng": "Zlib",
    "zope public": "LicenseRef-ZPL-unspecified",
    "zpl 2.1": "ZPL-2.1",
}

_MARKS = {"ce", "fcc", "reach", "rohs", "ukca", "ul", "weee"}
_MARK_WORDS = {"2", "3", "and", "compliance", "compliant", "conform", "conformant", "marked", "ok", "yes"}
_DENIALS = {"no", "non", "noncompliant", "not"}


def spdx_name(text: str) -> str | None:
    """Return the SPDX expression that a common name or a trove classifier stands for, or None."""
    words = _words(text.rsplit("::", 1)[-1])
    return _NAMES.get(" ".join(words)) or _gnu(text, words)


def names_only_a_family(text: str, expression: str) -> bool:
    """Tell whether a name leaves the version open: "BSD", "GNU General Public License (GPL)"."""
    unversioned = expression.endswith("-or-later") and not any(character.isdigit() for character in text)
    return unversioned or expression.startswith("LicenseRef-")


def compliance(text: str) -> bool | None:
    """Return True when the text only names marks such as RoHS or CE, False when it denies one, else None."""
    denied = False
    for statement in re.split(r"[;,/&+]", text.lower()):
        words = set(re.findall(r"[a-z]+|\d+", statement))
        if not words & _MARKS or words - _MARKS - _MARK_WORDS - _DENIALS:
            return None
        denied = denied or bool(words & _DENIALS)
    return not denied


def _words(text: str) -> list[str]:
    spaced = re.sub(r"v(?=\d)", " ", text.lower())
    words = re.findall(r"[a-z]+|\d+(?:\.\d+)*", spaced)
    return [re.sub(r"(\.0)+$", "", word) for word in words if word not in _FILLER]


def _gnu(text: str, words: list[str]) -> str | None:
    """Read the many spellings of the GNU licenses; without a version any published one may be chosen (GPL, 9)."""
    versions = [word for word in words if word[0].isdigit()]
    others = set(words) - set(versions)
    short = others & {"gpl", "lgpl", "agpl"}
    if (
        others - _GNU_WORDS
        or len(set(versions)) > 1
        or len(short) > 1
        or not (short or {"general", "public"} <= others)
    ):
        return None
    kind = "AGPL" if others & {"affero", "agpl"} else "LGPL" if others & {"lesser", "library", "lgpl"} else "GPL"
    if not versions:
        return f"{kind}-{_GNU_OLDEST[kind]}-or-later"
    number = versions[0] if "." in versions[0] else f"{versions[0]}.0"
    later = "later" in words or "+" in text
    return f"{kind}-{number}-{'or-later' if later else 'only'}"
