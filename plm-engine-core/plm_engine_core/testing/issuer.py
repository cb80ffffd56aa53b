"""A real OpenID Connect issuer on this machine, as far as a resource server meets one: discovery, keys and tokens.

A process of its own serves the two documents over HTTP; the keys are made here, so that tests can sign with any of
them. Rotation is publishing other keys, an outage is a process that is stopped or ended.
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

_MAKE: Final[Mapping[str, Callable[[], Any]]] = {
    "RS256": lambda: rsa.generate_private_key(public_exponent=65_537, key_size=2_048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}
_TO_JWK: Final[Mapping[str, Callable[..., Any]]] = {
    "RS256": jwt.algorithms.RSAAlgorithm.to_jwk,
    "ES256": jwt.algorithms.ECAlgorithm.to_jwk,
    "EdDSA": jwt.algorithms.OKPAlgorithm.to_jwk,
}


class LocalIssuer:
    """One issuer; made by `local_issuer`."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], url: str) -> None:
        self.folder = folder
        self.url = url
        self.audience = "https://plm.example"
        self._process = process
        self._keys: dict[str, tuple[str, Any]] = {}
        self.write(".well-known/openid-configuration", {"issuer": url, "jwks_uri": f"{url}/jwks.json"})

    def write(self, path: str, document: Any) -> None:
        """Serve another document at this path; a text is served as it is."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        draft.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        draft.replace(target)

    def make_key(self, algorithm: str = "ES256") -> str:
        """A new key's id; nobody knows the key until it is published."""
        key_id = f"{algorithm}-{secrets.token_hex(4)}"
        self._keys[key_id] = (algorithm, _MAKE[algorithm]())
        return key_id

    def public(self, key_id: str, **changes: Any) -> dict[str, Any]:
        """A key as it is published."""
        algorithm, key = self._keys[key_id]
        document: dict[str, Any] = _TO_JWK[algorithm](key.public_key(), as_dict=True)
        return {**document, "kid": key_id, "alg": algorithm, "use": "sig", **changes}

    def publish(self, *key_ids: str) -> None:
        """Serve exactly these keys."""
        self.write("jwks.json", {"keys": [self.public(key_id) for key_id in key_ids]})

    def token(self, key_id: str, *, header: Mapping[str, Any] | None = None, **changes: Any) -> str:
        """A good access token signed with this key, with changes; a claim that is None is left out."""
        algorithm, key = self._keys[key_id]
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": self.audience,
            "sub": "auth0|8f2c",
            "tenant_id": "00000000-0000-4000-8000-000000000002",
            "actor_kind": "human",
            "scope": "plm.runs.create plm.halt",
            "iat": now,
            "exp": now + 600,
            **changes,
        }
        kept = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(kept, key, algorithm, headers={"kid": key_id, "typ": "at+jwt", **(header or {})})

    @property
    def requests(self) -> list[str]:
        """The paths that were asked for so far."""
        return re.findall(r'"GET (\S+) ', (self.folder.parent / "requests.log").read_text(encoding="utf-8"))

    def freeze(self) -> None:
        """Answer nothing any more, and refuse no connection."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Answer again."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Be gone."""
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait(10)


@contextmanager
def local_issuer(folder: Path) -> Iterator[LocalIssuer]:
    """An issuer that serves for the length of the block, with no key yet; `folder` must be empty."""
    served = folder / "served"
    served.mkdir(parents=True)
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(served)]
    with (
        (folder / "requests.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            said = process.stdout.readline() if process.stdout is not None else ""
            found = re.search(r"port (\d+)", said)
            if found is None:
                raise RuntimeError(f"the issuer did not start: {said!r}")
            issuer = LocalIssuer(served, process, f"http://127.0.0.1:{found[1]}")
            yield issuer
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
