"""The keys of an OpenID Connect issuer: found by discovery, fetched within bounds, kept for a while.

Everything the issuer sends is checked like any other input from outside. Redirects are never followed, and keys come
from the issuer's own origin or from the address an operator named: a discovery document cannot point us elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import jwt

from plm_engine_core.control_plane.identity.errors import IdentityProviderConfigError, IdentityProviderUnavailable

if TYPE_CHECKING:
    import httpx

EARLY_SECONDS: Final = 240.0
"""Keys this old are fetched anew beside those who use them."""
FRESH_SECONDS: Final = 300.0
"""Keys this old are fetched anew before they are used: so long may a key that was withdrawn still count."""
FAILED_SECONDS: Final = 30.0
"""Nobody waits for a fetch so soon after one that failed: longer than two tries are apart while requests come."""
STALE_SECONDS: Final = 3_600.0
"""While the issuer cannot be reached, keys of up to this age still count; then nobody is let in."""
COOLDOWN_SECONDS: Final = 10.0
"""Between two fetches, whatever tokens ask for: who sends unknown key ids does not make us flood the issuer."""

MAX_BYTES: Final = 262_144
MAX_KEYS: Final = 64
_TIMEOUT_SECONDS: Final = 5.0
_MIN_RSA_BITS: Final = 2_048  # RFC 7518, section 3.3
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """A public key, and the one algorithm it is declared for, where it is."""

    key: Any = field(repr=False)
    algorithm: str | None
    kind: str


class IssuerKeys:
    """The signing keys of one issuer by key id.

    `at` never touches the network. `refresh` fetches, at most once in `cooldown_seconds` and one at a time: who waits
    for a fetch that is under way gets its result, and whoever of them is cancelled ends it for nobody else.
    """

    def __init__(
        self,
        issuer: str,
        *,
        jwks_uri: str | None = None,
        client: Callable[[], httpx.AsyncClient] | None = None,
        clock: Callable[[], float] = time.monotonic,
        early_seconds: float = EARLY_SECONDS,
        fresh_seconds: float = FRESH_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        cooldown_seconds: float = COOLDOWN_SECONDS,
    ) -> None:
        import httpx  # only where an issuer is asked, and not in the midst of a request

        self._failures = (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError)
        self._issuer = issuer
        self._jwks_uri = jwks_uri
        self._client = client or _client
        self._clock = clock
        self._early, self._fresh, self._stale = min(early_seconds, fresh_seconds), fresh_seconds, stale_seconds
        self._patience = min(FAILED_SECONDS, fresh_seconds)
        self._cooldown = cooldown_seconds
        self._keys: Mapping[str, SigningKey] = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._failed_at: float | None = None
        self._reachable = True
        self._fetching: asyncio.Task[None] | None = None

    @property
    def due(self) -> bool:
        """Whether the keys should be fetched anew, beside who uses them."""
        return self._since(self._fetched_at) >= self._early

    @property
    def overdue(self) -> bool:
        """Whether the keys should be fetched before they are used: they are old, and no fetch failed a moment ago."""
        return self._since(self._fetched_at) >= self._fresh and self._since(self._failed_at) >= self._patience

    @property
    def reachable(self) -> bool:
        """Whether the last fetch worked."""
        return self._reachable

    def knows(self, key_id: str) -> bool:
        """Whether the key of this id is at hand and still counts."""
        return self._usable and key_id in self._keys

    @property
    def _usable(self) -> bool:
        return self._since(self._fetched_at) <= self._stale

    def _since(self, moment: float | None) -> float:
        return math.inf if moment is None else self._clock() - moment

    def at(self, key_id: str) -> SigningKey | None:
        """The key of this id, or None where the issuer had none when it was last asked.

        Raises:
            IdentityProviderUnavailable: there are no keys, or they are too old to be believed.
        """
        if not self._usable:
            raise self.unavailable()
        return self._keys.get(key_id)

    def unavailable(self) -> IdentityProviderUnavailable:
        """What to raise when a token cannot be judged."""
        return IdentityProviderUnavailable(
            "the identity provider's keys cannot be had now", retry_after_seconds=max(1, round(self._cooldown))
        )

    def refresh_soon(self) -> None:
        """Refresh beside the caller: keys that still count make nobody wait for an issuer that is slow."""
        under_way = self._fetching is not None and not self._fetching.done()
        if not under_way and self._since(self._tried_at) >= self._cooldown:
            self._tried_at = self._clock()
            self._fetching = asyncio.create_task(self._refresh(), name="identity provider's keys")

    async def refresh(self) -> None:
        """Fetch the keys, unless that was tried a moment ago; a failure is logged and leaves the old ones."""
        self.refresh_soon()
        if self._fetching is not None and not self._fetching.done():
            await asyncio.shield(self._fetching)

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(2 * _TIMEOUT_SECONDS):
                self._keys = await self._fetch()
        except self._failures as error:
            self._failed_at, self._reachable = self._clock(), False
            _log.warning("the keys of %s could not be fetched: %s", self._issuer, _sentence(error))
        except Exception:  # noqa: BLE001  # whatever it is, the issuer could not be asked; nobody is let in by it
            self._failed_at, self._reachable = self._clock(), False
            _log.exception("the keys of %s could not be fetched for a reason unforeseen", self._issuer)
        else:
            self._fetched_at, self._failed_at, self._reachable = self._clock(), None, True

    async def _fetch(self) -> Mapping[str, SigningKey]:
        async with self._client() as client:
            uri = self._jwks_uri or await self._discover(client)
            return read_keys(await _document(client, uri))

    async def _discover(self, client: httpx.AsyncClient) -> str:
        """OpenID Connect Discovery 1.0, section 4; the issuer must be exactly the one that was configured."""
        document = await _document(client, f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
        if document.get("issuer") != self._issuer:
            raise ValueError("its discovery document names another issuer")
        uri = document.get("jwks_uri")
        if not isinstance(uri, str) or _origin(uri) != _origin(self._issuer):
            raise ValueError("its jwks_uri is not at the issuer's own origin; name it in PLM_OIDC_JWKS_URI to trust it")
        return uri


def read_keys(document: Mapping[str, Any]) -> Mapping[str, SigningKey]:
    """The usable signing keys of a JSON Web Key Set (RFC 7517) by key id; what is not usable is left out.

    Raises:
        ValueError: it holds no usable key, or too many.
    """
    entries = document.get("keys")
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise ValueError(f"its key set is no list of at most {MAX_KEYS} keys")
    keys: dict[str, SigningKey] = {}
    for entry in entries:
        key = _read_key(entry)
        if key is not None:
            keys.setdefault(entry["kid"], key)
    if not keys:
        raise ValueError("its key set holds no usable key")
    return keys


def _read_key(entry: Any) -> SigningKey | None:
    """A public signing key with an id; never a shared secret, which everyone could read there."""
    if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC", "OKP"):  # it may be unhashable
        return None
    if not isinstance(entry.get("kid"), str) or entry.get("use", "sig") != "sig":
        return None
    try:
        # Without its private part, should an issuer be so careless as to publish it.
        public = {name: value for name, value in entry.items() if name not in {"d", "p", "q", "dp", "dq", "qi", "oth"}}
        key = jwt.PyJWK.from_dict(public)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if entry["kty"] == "RSA" and key.key.key_size < _MIN_RSA_BITS:
        return None
    algorithm = entry.get("alg")
    return SigningKey(key=key.key, algorithm=algorithm if isinstance(algorithm, str) else None, kind=entry["kty"])


async def _document(client: httpx.AsyncClient, url: str) -> Mapping[str, Any]:
    """One JSON object, read up to a bound; a redirect is an answer like any other that is not 200."""
    async with client.stream("GET", url, headers={"Accept": "application/json"}) as response:
        if response.status_code != HTTPStatus.OK:
            raise ValueError(f"it answered {response.status_code}")
        body = bytearray()
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_BYTES:
                raise ValueError(f"its answer is longer than {MAX_BYTES} bytes")
    try:
        document = json.loads(body)
    except RecursionError:
        raise ValueError("its answer is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("its answer is no JSON object")  # noqa: TRY004  # the caller counts it as a bad answer
    return document


def _client() -> httpx.AsyncClient:
    import httpx

    try:
        return httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, follow_redirects=False)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"SSL_CERT_FILE, SSL_CERT_DIR or a proxy's variable cannot be used: {error}") from error


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def checked_address(url: str, *, variable: str, development: bool) -> str:
    """An address that keys may come from: https, or in development http on this machine.

    Raises:
        IdentityProviderConfigError: it is not.
    """
    try:
        scheme, host, _ = _origin(url)
        parts = urlsplit(url)
    except ValueError:
        scheme, host, parts = "", None, urlsplit("")
    local = development and scheme == "http" and host in _LOOPBACK
    if not host or not (scheme == "https" or local) or parts.username or parts.query or parts.fragment:
        secret = "@" in url or "?" in url
        got = "one with a login or a query, which is not repeated here" if secret else f"{url!r:.100}"
        raise IdentityProviderConfigError(
            f"{variable} must be an https address without login, query and fragment (in development also http on this "
            f"machine); got {got}"
        )
    return url


def checked_algorithms(names: Collection[str]) -> frozenset[str]:
    """Asymmetric signature algorithms (RFC 7518, RFC 8037).

    Raises:
        IdentityProviderConfigError: none is named, or another one.
    """
    unknown = sorted(set(names) - KIND_OF_ALGORITHM.keys())
    if unknown or not names:
        raise IdentityProviderConfigError(
            f"PLM_OIDC_ALGORITHMS may name {', '.join(KIND_OF_ALGORITHM)}; got {', '.join(unknown) or 'none'}"
        )
    return frozenset(names)


KIND_OF_ALGORITHM: Final[Mapping[str, str]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA"),
    **dict.fromkeys(("ES256", "ES384", "ES512"), "EC"),
    "EdDSA": "OKP",
}
"""Which kind of key makes which signature; shared secrets (HS256) are not among them, on purpose."""


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
