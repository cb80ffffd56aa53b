"""The keys that sign checkpoints: Ed25519 (RFC 8032), in PEM files."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from plm_engine_core.control_plane.errors import InvalidRequest


class Signer:
    """A private key; `key_id` names its public half: the first 16 hex digits of the SHA-256 of its 32 bytes."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.key_id = key_id(key.public_key())

    def __repr__(self) -> str:
        return f"Signer({self.key_id})"

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of a signature."""
        return self._key.sign(message)

    @property
    def public_pem(self) -> str:
        """The public half, to be kept by those who check."""
        return self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


class PublicKeys:
    """The keys whose signatures are believed; after a rotation the old ones stay among them."""

    def __init__(self, keys: Iterable[Ed25519PublicKey]) -> None:
        self._keys = {key_id(key): key for key in keys}

    def problem(self, key: str, signature: bytes, message: bytes) -> str:
        """Why a signature is not believed; empty when it is."""
        known = self._keys.get(key)
        if known is None:
            return f"it is signed with key {key}, which is not among those believed ({', '.join(self._keys) or 'none'})"
        try:
            known.verify(signature, message)
        except InvalidSignature:
            return f"its signature by key {key} is wrong"
        return ""


def key_id(key: Ed25519PublicKey) -> str:
    """The short name of a public key."""
    return sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def new_private_pem() -> str:
    """A fresh private key; whoever has it can sign in this installation's name."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")


def load_signer(path: Path) -> Signer:
    """Read a private key that only its owner can read.

    Raises:
        InvalidRequest: the file is missing, open to others, or holds no Ed25519 private key; its content is not told.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"the signing key {path} cannot be read: {error.strerror}", field="events_key") from error
    if mode & 0o077:
        raise InvalidRequest(
            f"the signing key {path} is open to others (mode {mode:04o}); run: chmod 600 {path}", field="events_key"
        )
    try:
        key = load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidRequest(f"{path} holds no private key in PEM without a password", field="events_key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidRequest(f"{path} holds a key that is not Ed25519", field="events_key")
    return Signer(key)


def load_public_keys(paths: Iterable[Path]) -> PublicKeys:
    """Read public keys, each from a PEM file of its own.

    Raises:
        InvalidRequest: naming the file that is missing or holds no Ed25519 public key.
    """
    return PublicKeys([_public_key(path) for path in paths])


def _public_key(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"the public key {path} cannot be read: {error.strerror}", field="public_key") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidRequest(f"{path} holds no public key in PEM", field="public_key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidRequest(f"{path} holds a key that is not Ed25519", field="public_key")
    return key
