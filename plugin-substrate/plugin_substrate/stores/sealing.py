"""Keeps what a file of secrets holds from whoever has the file and not the key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from plugin_substrate.errors import StoreError

#: The variable of a host's environment that has the key: 32 random bytes in URL-safe base64. Of several, with commas
#: between them, the first one seals and every one opens: so keys are changed while hosts run.
KEY_VARIABLE = "CJM_SECRETS_KEY"

_SEALED = b"gAAAA"  # how every Fernet token begins: its version, and a time before the year 2106


class Cipher(Protocol):
    """What seals and opens: Fernet of `cryptography`."""

    def encrypt(self, data: bytes) -> bytes:
        """Return sealed bytes."""
        ...

    def decrypt(self, token: bytes) -> bytes:
        """Return what was sealed; bytes that were not, or with another key, are an `InvalidToken`."""
        ...


def cipher_from_environment() -> Cipher | None:
    """Return the cipher of the keys in `KEY_VARIABLE`, None when it is not set; a `StoreError` when one is no key."""
    keys = [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",")]
    if not any(keys):
        return None
    try:
        from cryptography.fernet import Fernet, MultiFernet
    except ImportError:
        raise StoreError(
            f"{KEY_VARIABLE} is set, and cryptography is not installed; install plugin-substrate[secrets]", path=""
        ) from None
    try:
        return MultiFernet([Fernet(key) for key in keys])
    except ValueError:
        raise StoreError(
            f"{KEY_VARIABLE} must be 32 bytes in URL-safe base64, or several such with commas between them: "
            "openssl rand -base64 32 | tr '+/' '-_'",
            path="",
        ) from None


def is_sealed(content: bytes) -> bool:
    """Whether what a file holds was sealed."""
    return content.startswith(_SEALED)


def seal(data: bytes, cipher: Cipher | None) -> bytes:
    """Return the content of a file: sealed where there is a cipher."""
    return cipher.encrypt(data) if cipher else data


def unseal(content: bytes, cipher: Cipher | None, path: Path) -> bytes:
    """Return what a file holds, sealed or from before it was; a `StoreError` without the key it was sealed with."""
    if not is_sealed(content):
        return content
    if cipher is None:
        raise StoreError(f"{path} is encrypted; set {KEY_VARIABLE} to its key", path=str(path))
    from cryptography.fernet import InvalidToken

    try:
        return cipher.decrypt(content)
    except InvalidToken:
        raise StoreError(
            f"{path} was not encrypted with a key in {KEY_VARIABLE}, or is damaged", path=str(path)
        ) from None
