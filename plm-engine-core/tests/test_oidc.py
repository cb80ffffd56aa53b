"""Tokens of a real issuer: its process, its HTTP, its keys."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plm_engine_core.control_plane.identity import (
    ClaimNames,
    Hs256JwtIdentityProvider,
    IdentityExpiredError,
    IdentityInvalidSignatureError,
    IdentityMiddleware,
    IdentityProviderConfigError,
    IdentityProviderUnavailable,
    IdentityValidationError,
    InMemoryAuditSink,
    IssuerKeys,
    OidcIdentityProvider,
    identity_mode,
    provider_from_environment,
)
from plm_engine_core.control_plane.identity import issuer_keys as module
from plm_engine_core.testing.issuer import LocalIssuer, local_issuer

TENANT = uuid.UUID("00000000-0000-4000-8000-000000000002")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Side:
    """Our side of one issuer: a provider with a clock that tests move."""

    def __init__(self, issuer: LocalIssuer, **options: Any) -> None:
        keys_options = {name: options.pop(name) for name in ("jwks_uri",) if name in options}
        self.clock = Clock()
        self.keys = IssuerKeys(issuer.url, clock=self.clock, **keys_options)
        settings = {"issuer": issuer.url, "audience": issuer.audience, "keys": self.keys, **options}
        self.provider = OidcIdentityProvider(**settings)

    async def reason(self, token: str) -> str:
        with pytest.raises(IdentityValidationError) as caught:
            await self.provider.identify(token)
        return caught.value.reason.value


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[LocalIssuer]:
    with local_issuer(tmp_path / "issuer") as issuer:
        yield issuer


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalIssuer]:
    """An issuer for tests that publish what they need before they begin, and do nothing else to it."""
    with local_issuer(tmp_path_factory.mktemp("steady") / "issuer") as issuer:
        yield issuer


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_token_of_the_issuer_becomes_an_identity(issuer: LocalIssuer, algorithm: str) -> None:
    key = issuer.make_key(algorithm)
    issuer.publish(key)
    side = Side(issuer, algorithms=("RS256", "ES256", "EdDSA"))
    identity = await side.provider.identify(issuer.token(key, session_id="s-1"))
    assert (identity.tenant_id, identity.actor_kind, identity.session_id) == (TENANT, "human", "s-1")
    assert identity.scopes == {"plm.runs.create", "plm.halt"}
    assert issuer.requests == ["/.well-known/openid-configuration", "/jwks.json"]


async def test_a_subject_keeps_its_user_id_and_another_issuers_subject_is_somebody_else(steady: LocalIssuer) -> None:
    key = steady.make_key()
    steady.publish(key)
    first = await Side(steady).provider.identify(steady.token(key))
    again = await Side(steady).provider.identify(steady.token(key))
    assert first.user_id == again.user_id
    named = uuid.UUID("0190c6a2-7c1e-7d5a-9b41-5a0f3f6f7a11")
    assert (await Side(steady).provider.identify(steady.token(key, sub=str(named)))).user_id == named
    for alike in (f"{{{named}}}", named.urn, named.hex, str(named).upper()):  # subjects are told apart by every letter
        assert (await Side(steady).provider.identify(steady.token(key, sub=alike))).user_id != named
    for word in ("None", "null", "0"):
        assert (await Side(steady).provider.identify(steady.token(key, sub=word))).user_id != first.user_id
    other = OidcIdentityProvider(issuer="https://other.example", audience="a", keys=IssuerKeys("https://other.example"))
    assert other._subject("auth0|8f2c") != str(first.user_id)


async def test_claims_are_read_where_the_issuer_puts_them(steady: LocalIssuer) -> None:
    key = steady.make_key()
    steady.publish(key)
    side = Side(steady, claims=ClaimNames(tenant_id="https://plm/t", actor_kind="https://plm/k", scopes="roles"))
    token = steady.token(
        key,
        tenant_id=str(uuid.uuid4()),  # ours under its own name does not count
        actor_kind="system",
        roles=["plm.halt"],
        **{"https://plm/t": str(TENANT), "https://plm/k": "agent"},
    )
    identity = await side.provider.identify(token)
    assert (identity.tenant_id, identity.actor_kind, identity.scopes) == (TENANT, "agent", {"plm.halt"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "https://somebody.example"}, "wrong_issuer"),
        ({"iss": None}, "missing_claim"),
        ({"aud": "https://another.example"}, "wrong_audience"),
        ({"aud": None}, "missing_claim"),
        ({"exp": 1_000_600, "iat": 1_000_000}, "expired"),
        ({"nbf": 4_000_000_000}, "not_yet_valid"),
        ({"tenant_id": None}, "missing_claim"),
        ({"actor_kind": None}, "missing_claim"),
        ({"actor_kind": "system"}, "invalid_actor_kind"),
        ({"actor_kind": ["human"]}, "invalid_actor_kind"),
        ({"scope": None}, "missing_claim"),
        ({"scope": 5}, "invalid_claim"),
        ({"sub": 5}, "invalid_claim"),
        ({"sub": "\ud800"}, "invalid_claim"),
        ({"exp": 4_000_000_000}, "max_lifetime_exceeded"),
    ],
)
async def test_a_signed_token_that_is_not_for_us_is_refused(
    steady: LocalIssuer, changes: dict[str, Any], reason: str
) -> None:
    key = steady.make_key()
    steady.publish(key)
    assert await Side(steady).reason(steady.token(key, **changes)) == reason


async def test_the_algorithm_is_ours_to_choose(steady: LocalIssuer) -> None:
    rsa, edwards = steady.make_key("RS256"), steady.make_key("EdDSA")
    steady.publish(rsa, edwards)
    side = Side(steady)
    assert await side.reason(steady.token(edwards)) == "unsupported_algorithm"  # published, and not on our list
    public = json.dumps(steady.public(rsa))
    confused = jwt.encode({"sub": "x"}, public * 2, "HS256", headers={"kid": rsa})
    assert await side.reason(confused) == "unsupported_algorithm"
    swapped = steady.token(rsa, header={"alg": "RS256", "kid": edwards})
    assert await side.reason(swapped) == "unsupported_algorithm"  # the key of that id makes other signatures
    unsigned = jwt.encode({"sub": "x"}, None, "none", headers={"kid": rsa})
    assert await side.reason(unsigned) == "unsupported_algorithm"
    assert await side.reason(steady.token(rsa, header={"typ": "logout+jwt"})) == "malformed_token"
    with pytest.raises(IdentityProviderConfigError, match="HS256"):
        Side(steady, algorithms=("RS256", "HS256"))


async def test_clocks_may_be_apart_by_the_leeway_and_no_more(steady: LocalIssuer) -> None:
    key = steady.make_key()
    steady.publish(key)
    now = int(time.time())
    ahead = steady.token(key, iat=now + 60, nbf=now + 60)
    late = steady.token(key, iat=now - 600, exp=now - 60)
    wide, narrow = Side(steady, leeway_seconds=110), Side(steady, leeway_seconds=0)
    for token in (ahead, late):
        await wide.provider.identify(token)
    assert await narrow.reason(ahead) == "not_yet_valid"
    with pytest.raises(IdentityExpiredError):
        await narrow.provider.identify(late)
    for bad in (-1, 121, float("nan")):
        with pytest.raises(IdentityProviderConfigError, match="LEEWAY"):
            Side(steady, leeway_seconds=bad)


async def test_a_rotated_key_is_found_and_a_withdrawn_one_ends(issuer: LocalIssuer) -> None:
    old, new = issuer.make_key(), issuer.make_key("ES256")
    issuer.publish(old)
    side = Side(issuer)
    await side.provider.identify(issuer.token(old))
    issuer.publish(new)
    assert await side.reason(issuer.token(new)) == "unknown_key"  # asked a moment ago
    side.clock.now += module.COOLDOWN_SECONDS
    await side.provider.identify(issuer.token(new))
    assert await side.reason(issuer.token(old)) == "unknown_key"


async def test_unknown_key_ids_make_one_fetch_however_many_ask(issuer: LocalIssuer) -> None:
    key, stranger = issuer.make_key(), issuer.make_key()
    issuer.publish(key)
    side = Side(issuer)
    await side.provider.identify(issuer.token(key))
    side.clock.now += module.COOLDOWN_SECONDS
    tokens = [issuer.token(stranger, header={"kid": f"made-up-{number}"}) for number in range(50)]
    answers = await asyncio.gather(*map(side.provider.identify, tokens), return_exceptions=True)
    assert {type(answer) for answer in answers} == {IdentityInvalidSignatureError}
    assert issuer.requests.count("/jwks.json") == 2


async def test_keys_outlive_a_short_outage_and_not_a_long_one(issuer: LocalIssuer) -> None:
    key, stranger = issuer.make_key(), issuer.make_key()
    issuer.publish(key)
    side = Side(issuer)
    await side.provider.identify(issuer.token(key))
    issuer.end()
    side.clock.now += module.FRESH_SECONDS
    await side.provider.identify(issuer.token(key))
    with pytest.raises(IdentityProviderUnavailable):  # it may be a new key of theirs: nobody can say
        await side.provider.identify(issuer.token(stranger))
    side.clock.now += module.STALE_SECONDS
    with pytest.raises(IdentityProviderUnavailable):
        await side.provider.identify(issuer.token(key))


async def test_a_frozen_issuer_holds_nobody_up_whose_key_is_known(issuer: LocalIssuer) -> None:
    key = issuer.make_key()
    issuer.publish(key)
    side = Side(issuer)
    await side.provider.identify(issuer.token(key))
    issuer.freeze()
    side.clock.now += module.EARLY_SECONDS
    for _ in range(20):
        await side.provider.identify(issuer.token(key))
    refreshing = side.keys._fetching
    assert refreshing is not None
    assert not refreshing.done(), "the fetch waits for the issuer, the callers did not"
    issuer.thaw()
    await refreshing
    assert side.keys.reachable


async def test_a_withdrawn_key_is_not_good_again_after_a_quiet_time(issuer: LocalIssuer) -> None:
    old, new = issuer.make_key(), issuer.make_key()
    issuer.publish(old)
    side = Side(issuer)
    await side.provider.identify(issuer.token(old))
    issuer.publish(new)
    side.clock.now += module.FRESH_SECONDS
    asked = [side.provider.identify(issuer.token(old)) for _ in range(5)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(answer) for answer in answers} == {IdentityInvalidSignatureError}
    assert issuer.requests.count("/jwks.json") == 2


async def test_after_a_failed_fetch_a_withdrawn_key_ends_soon_all_the_same(issuer: LocalIssuer) -> None:
    old, new = issuer.make_key(), issuer.make_key()
    issuer.publish(old)
    side = Side(issuer)
    await side.provider.identify(issuer.token(old))
    issuer.write("jwks.json", "<html>")
    side.clock.now += module.FRESH_SECONDS
    for _ in range(3):  # the issuer is asked once, and known keys count meanwhile
        await side.provider.identify(issuer.token(old))
    assert (issuer.requests.count("/jwks.json"), side.keys.overdue) == (2, False)
    issuer.publish(new)
    side.clock.now += module.FAILED_SECONDS
    assert await side.reason(issuer.token(old)) == "unknown_key"
    assert issuer.requests.count("/jwks.json") == 3


async def test_whoever_is_cancelled_ends_the_fetch_for_nobody_else(issuer: LocalIssuer) -> None:
    key = issuer.make_key()
    issuer.publish(key)
    issuer.freeze()
    side = Side(issuer)
    first = asyncio.create_task(side.provider.identify(issuer.token(key)))
    await asyncio.sleep(0)
    second = asyncio.create_task(side.provider.identify(issuer.token(key)))
    await asyncio.sleep(0)
    first.cancel()
    issuer.thaw()
    assert (await second).tenant_id == TENANT
    assert first.cancelled()
    assert issuer.requests == ["/.well-known/openid-configuration", "/jwks.json"]


async def test_who_waits_for_a_fetch_that_lasts_gets_its_result_and_makes_no_other() -> None:
    """An answer that comes byte by byte takes longer than the time between two fetches."""
    asked, clock = 0, Clock()

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        clock.now += module.COOLDOWN_SECONDS
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nno JSON")
        writer.close()

    async with await asyncio.start_server(dribble, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        keys = IssuerKeys(url, clock=clock)
        await asyncio.gather(*(keys.refresh() for _ in range(10)))
        assert (asked, keys.reachable) == (1, False)


@pytest.mark.parametrize(
    "variables", [{"SSL_CERT_FILE": "/nowhere/at/all"}, {"ALL_PROXY": "socks5://127.0.0.1:1"}], ids=str
)
async def test_a_machine_that_cannot_ask_an_issuer_says_so_and_never_crashes(
    variables: dict[str, str], steady: LocalIssuer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = steady.make_key()
    steady.publish(key)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(IdentityProviderUnavailable):
        await Side(steady).provider.identify(steady.token(key))
    assert "SSL_CERT_FILE, SSL_CERT_DIR or a proxy's variable cannot be used" in caplog.text


async def test_an_issuer_that_is_not_there_is_a_503_and_never_a_500(issuer: LocalIssuer) -> None:
    key = issuer.make_key()
    token = issuer.token(key)
    issuer.end()
    audit = InMemoryAuditSink()
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("nobody was let in")

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    door = IdentityMiddleware(application, provider=Side(issuer).provider, audit=audit)
    headers = [(b"authorization", f"Bearer {token}".encode())]
    await door({"type": "http", "path": "/v1/runs", "headers": headers}, receive, send)
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"10") in sent[0]["headers"]
    document = json.loads(sent[1]["body"])
    assert (document["code"], document["retry_after_ms"]) == ("IDENTITY_PROVIDER_UNAVAILABLE", 10_000)
    assert audit.records == []


BAD_KEY_SETS: dict[str, Any] = {
    "no JSON": "<html>",
    "deep": "[" * 100_000,
    "a list": [],
    "no keys": {"keys": []},
    "keys is text": {"keys": "all"},
    "too many": {"keys": [{}] * 65},
    "too long": json.dumps({"keys": [], "pad": "x" * module.MAX_BYTES}),
    "a shared secret": {"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "one", "alg": "HS256"}]},
    "kinds that are none": {"keys": [{"kty": ["RSA"], "kid": "one"}, {"kty": {}, "kid": "two"}]},
    "damaged": {"keys": [{"kty": "RSA", "kid": "one", "n": "!!", "e": 5}, {"kty": "EC", "kid": "two"}, 7, None]},
}


@pytest.mark.parametrize("document", BAD_KEY_SETS.values(), ids=BAD_KEY_SETS.keys())
async def test_a_key_set_that_cannot_be_used_lets_nobody_in(steady: LocalIssuer, document: Any) -> None:
    steady.write("jwks.json", document)
    with pytest.raises(IdentityProviderUnavailable):
        await Side(steady).provider.identify(steady.token(steady.make_key()))


async def test_a_damaged_or_weak_key_does_not_take_the_others_away(steady: LocalIssuer) -> None:
    key = steady.make_key()
    weak = {**steady.public(steady.make_key("RS256")), "kid": "weak", "n": "AQAB"}
    encryption = steady.public(key, kid="encryption", use="enc")
    steady.write(
        "jwks.json", {"keys": [{"kty": "RSA"}, {"kty": ["RSA"], "kid": "odd"}, weak, encryption, steady.public(key)]}
    )
    side = Side(steady)
    await side.provider.identify(steady.token(key))
    assert await side.reason(steady.token(key, header={"kid": "weak"})) == "unknown_key"
    assert await side.reason(steady.token(key, header={"kid": "encryption"})) == "unknown_key"


async def test_a_discovery_document_cannot_send_us_elsewhere(issuer: LocalIssuer, tmp_path: Path) -> None:
    key = issuer.make_key()
    issuer.publish(key)
    with local_issuer(tmp_path / "inside") as inside:
        inside.publish(inside.make_key())
        issuer.write(".well-known/openid-configuration", {"issuer": issuer.url, "jwks_uri": f"{inside.url}/jwks.json"})
        with pytest.raises(IdentityProviderUnavailable):
            await Side(issuer).provider.identify(issuer.token(key))
        assert inside.requests == []
        await Side(issuer, jwks_uri=f"{issuer.url}/jwks.json").provider.identify(issuer.token(key))


async def test_a_redirect_is_not_followed(issuer: LocalIssuer) -> None:
    key = issuer.make_key()
    issuer.write("moved/index.html", {"keys": [issuer.public(key)]})  # this server redirects /moved to /moved/
    with pytest.raises(IdentityProviderUnavailable):
        await Side(issuer, jwks_uri=f"{issuer.url}/moved").provider.identify(issuer.token(key))
    assert issuer.requests == ["/moved"]
    await Side(issuer, jwks_uri=f"{issuer.url}/moved/").provider.identify(issuer.token(key))


async def test_a_discovery_document_of_another_issuer_is_refused(issuer: LocalIssuer) -> None:
    key = issuer.make_key()
    issuer.publish(key)
    issuer.write(
        ".well-known/openid-configuration", {"issuer": f"{issuer.url}/", "jwks_uri": f"{issuer.url}/jwks.json"}
    )
    with pytest.raises(IdentityProviderUnavailable):
        await Side(issuer).provider.identify(issuer.token(key))


@pytest.mark.parametrize(
    "changes",
    [
        {"PLM_OIDC_ISSUER": ""},
        {"PLM_OIDC_AUDIENCE": ""},
        {"PLM_OIDC_ISSUER": "http://issuer.example"},
        {"PLM_OIDC_ISSUER": "http://127.0.0.1:1", "ENVIRONMENT": "production"},
        {"PLM_OIDC_ISSUER": "file:///etc/passwd"},
        {"PLM_OIDC_ISSUER": "https://user:word@issuer.example"},
        {"PLM_OIDC_ISSUER": "https://issuer.example?x=1"},
        {"PLM_OIDC_ISSUER": "https://[::1"},
        {"PLM_OIDC_JWKS_URI": "http://169.254.169.254/latest"},
        {"PLM_OIDC_ALGORITHMS": "RS256,none"},
        {"PLM_OIDC_ALGORITHMS": ","},
        {"PLM_IDENTITY_LEEWAY_SECONDS": "3600"},
        {"PLM_IDENTITY_LEEWAY_SECONDS": "soon"},
        {"IDENTITY_PROVIDER_MODE": "hs256"},
        {"IDENTITY_PROVIDER_MODE": "off"},
    ],
    ids=str,
)
def test_a_setting_that_would_weaken_it_keeps_the_process_from_starting(changes: dict[str, str]) -> None:
    good = {
        "IDENTITY_PROVIDER_MODE": "oidc",
        "PLM_OIDC_ISSUER": "https://issuer.example/realm",
        "PLM_OIDC_AUDIENCE": "https://plm.example",
        "PLM_IDENTITY_HS256_SECRET_ACTIVE": "3f" * 2 + "a-secret-for-tests-of-forty-characters!!",
    }
    assert isinstance(provider_from_environment({**good, "ENVIRONMENT": "production"}), OidcIdentityProvider)
    with pytest.raises(IdentityProviderConfigError) as refused:
        provider_from_environment({**good, **changes})
    assert "word" not in str(refused.value)


def test_an_issuer_alone_chooses_it_and_no_setting_means_shared_secrets() -> None:
    assert identity_mode({"PLM_OIDC_ISSUER": "https://issuer.example"}) == "oidc"
    assert identity_mode({}) == "hs256"
    assert identity_mode({"IDENTITY_PROVIDER_MODE": " OIDC "}) == "oidc"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=5)
"""Half a surrogate pair too: JSON can escape it, and UTF-8 cannot say it."""
CLAIMS = st.dictionaries(
    st.sampled_from(["sub", "tenant_id", "actor_kind", "scopes", "scope", "exp", "iat", "nbf", "aud", "iss", "jti"]),
    JSON | ANY_TEXT,
    max_size=6,
)
HEADER = st.dictionaries(st.sampled_from(["typ", "crit", "kid", "b64", "cty", "x5c", "jku", "jwk"]), JSON, max_size=3)
SECRET = "a-secret-for-tests-of-forty-characters!!"


def _signed(key: Any, algorithm: str, payload: dict[str, Any], header: dict[str, Any]) -> str:
    """Signed rightly, whatever it says; what no library would write is built by hand."""
    parts = [{"alg": algorithm, "typ": "JWT", **header}, payload]
    encoded = b".".join(jwt.utils.base64url_encode(json.dumps(part).encode("utf-8", "surrogatepass")) for part in parts)
    made = jwt.get_algorithm_by_name(algorithm)
    return (encoded + b"." + jwt.utils.base64url_encode(made.sign(encoded, made.prepare_key(key)))).decode()


@settings(max_examples=150, deadline=None)
@given(changes=CLAIMS, header=HEADER)
def test_whatever_a_rightly_signed_token_of_a_shared_secret_says_is_an_identity_or_a_typed_refusal(
    changes: dict[str, Any], header: dict[str, Any]
) -> None:
    now = int(time.time())
    good = {"sub": str(TENANT), "tenant_id": str(TENANT), "actor_kind": "human", "scopes": [], "iat": now}
    provider = Hs256JwtIdentityProvider(active_secret=SECRET)
    try:
        provider.validate(_signed(SECRET, "HS256", {**good, "exp": now + 60, **changes}, header))
    except IdentityValidationError:
        return


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CLAIMS, header=HEADER, junk=st.text(max_size=200))
def test_whatever_a_token_of_the_issuer_says_is_an_identity_or_a_typed_refusal(
    changes: dict[str, Any], header: dict[str, Any], junk: str, steady: LocalIssuer, known: dict[str, Any]
) -> None:
    if not known:
        key = steady.make_key("ES256")
        steady.publish(key)
        side = Side(steady)
        asyncio.run(side.keys.refresh())
        known.update(side=side, key_id=key, key=steady._keys[key][1])
    now = int(time.time())
    good = {"iss": steady.url, "aud": steady.audience, "sub": "a", "tenant_id": str(TENANT), "actor_kind": "human"}
    payload = {**good, "scope": "", "iat": now, "exp": now + 60, **changes}
    provider = known["side"].provider
    for token in (_signed(known["key"], "ES256", payload, {"kid": known["key_id"], **header}), junk):
        try:
            provider.validate(token)
        except IdentityValidationError:
            continue


@pytest.fixture
def known() -> dict[str, Any]:
    """What all examples share: making a key takes longer than checking a token."""
    return {}
