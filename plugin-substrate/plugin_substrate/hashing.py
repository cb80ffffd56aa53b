"""Digests of bytes, files and JSON values, always written ``algorithm:hexdigest``."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_ALGORITHM = "sha256"

_BLOCK_BYTES = 1 << 20


def hash_bytes(data: bytes, algo: str = DEFAULT_ALGORITHM) -> str:
    """Return the digest of bytes; an unknown algorithm is a ValueError."""
    return f"{algo}:{hashlib.new(algo, data).hexdigest()}"


def hash_file(path: Path | str, algo: str = DEFAULT_ALGORITHM) -> str:
    """Return the digest of a file's content, read in blocks; an unknown algorithm is a ValueError."""
    digest = hashlib.new(algo)
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return f"{algo}:{digest.hexdigest()}"


def verify_hash(data: bytes, expected: str) -> bool:
    """Tell whether bytes have the digest ``algorithm:hexdigest``; a text of another form is a ValueError."""
    algo, separator, _ = expected.partition(":")
    if not separator:
        raise ValueError(f"a digest is written 'algorithm:hexdigest', not {expected!r:.80}")
    return hmac.compare_digest(hash_bytes(data, algo), expected.lower())


def hash_dict_canonical(value: Mapping[str, Any] | None, algo: str = DEFAULT_ALGORITHM) -> str:
    """Return the digest of a JSON object, whatever the order of its keys; None counts as an empty one.

    What has no JSON text, NaN included, is a TypeError or ValueError.
    """
    text = json.dumps(value or {}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hash_bytes(text.encode(), algo)
