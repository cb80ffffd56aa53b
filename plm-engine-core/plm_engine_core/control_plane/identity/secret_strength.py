"""Whether a shared secret looks random: what a person thought up can be guessed from a single token, offline.

RFC 8725, section 3.5: keys need sufficient entropy, and passwords must not be used as keys. No test can prove that a
text is random; this one refuses what certainly is not. Random bytes in hexadecimal or base64 always pass.
"""

from __future__ import annotations

from typing import Final

MIN_SECRET_BYTES: Final = 32  # RFC 7518, section 3.2: a key of at least the hash's size
_MIN_TRIPLES: Final = 21
"""Of 32 random hexadecimal digits, the smallest good secret, hardly one in a thousand million has fewer; a word of
eight letters repeated for ever has 8."""

_PLACEHOLDERS: Final = (
    "256bitsecret", "atleast256bits", "changeit", "changeme", "changethis", "defaultsecret", "examplesecret",
    "insecure", "mysecret", "passw0rd", "password", "placeholder", "replaceme", "replacethis", "secretkey",
    "supersecret", "topsecret", "yoursecret",
)  # fmt: skip


def weakness(secret: str) -> str | None:
    """Why a secret must not be used, in words that repeat nothing of it but a placeholder; None when it is fine."""
    try:
        size = len(secret.encode())
    except UnicodeEncodeError:  # an environment may hold any bytes
        return "is no UTF-8 text"
    if size < MIN_SECRET_BYTES:
        return f"has {size} bytes"
    letters = "".join(character for character in secret.casefold() if character.isalnum())
    for word in _PLACEHOLDERS:
        if word in letters:
            return f"contains the well-known placeholder {word!r}"
    if _new_triples(secret) < _MIN_TRIPLES:
        return "repeats itself or follows a sequence"
    return None


def _new_triples(text: str) -> int:
    """How many different triples of neighbours there are, without those that continue a run: ``aaa``, ``abc``, ``321``.

    Unlike an entropy of single characters, this sees repeated words and rows of the keyboard's digits.
    """
    codes = [ord(character) for character in text]
    triples = zip(codes, codes[1:], codes[2:], strict=False)
    return len({(a, b, c) for a, b, c in triples if not (b - a == c - b and abs(b - a) <= 1)})
