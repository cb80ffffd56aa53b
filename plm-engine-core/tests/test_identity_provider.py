"""What the HS256 provider accepts, and that everything else is a typed refusal."""

from __future__ import annotations

import base64
import json
import random
import secrets
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from plm_engine_core.control_plane.identity import (
    ActorKind,
    Hs256JwtIdentityProvider,
    IdentityExpiredError,
    IdentityInvalidSignatureError,
    IdentityMalformedError,
    IdentityProviderConfigError,
    IdentityValidationError,
)

SECRET = "a-secret-for-tests-of-forty-characters!!"
OLDER = "the-secret-before-that-one-of-40-letters"
USER, TENANT = uuid.UUID(int=1), uuid.UUID(int=2)


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    good = {
        "sub": str(USER),
        "tenant_id": str(TENANT),
        "actor_kind": "human",
        "scopes": ["plm.runs.create", "plm.runs.read"],
        "iat": now,
        "exp": now + 600,
    }
    return {name: value for name, value in (good | changes).items() if value is not ...}


def sign(payload: Any, secret: str = SECRET, algorithm: str | None = "HS256", **headers: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyJWT dislikes the weak keys that some tests use on purpose
        return jwt.encode(payload, secret, algorithm, headers=headers or None)


def raw(header: bytes, payload: bytes, secret: str = SECRET) -> str:
    """A correctly signed token around any bytes."""
    parts = [base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, payload)]
    key = jwt.get_algorithm_by_name("HS256")
    signature = key.sign(b".".join(parts), secret.encode())
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


@pytest.fixture
def provider() -> Hs256JwtIdentityProvider:
    return Hs256JwtIdentityProvider(active_secret=SECRET)


def test_a_good_token_becomes_an_identity_with_all_its_parts(provider: Hs256JwtIdentityProvider) -> None:
    payload = claims(session_id="s-1", unknown_claim={"is": "ignored"})
    identity = provider.validate(sign(payload))
    assert (identity.user_id, identity.tenant_id, identity.session_id) == (USER, TENANT, "s-1")
    assert identity.actor_kind is ActorKind.HUMAN
    assert identity.scopes == {"plm.runs.create", "plm.runs.read"}
    assert (identity.issued_at.timestamp(), identity.expires_at.timestamp()) == (payload["iat"], payload["exp"])
    assert identity in {identity}


def test_a_previous_secret_is_accepted_but_never_signs() -> None:
    rotated = Hs256JwtIdentityProvider(active_secret=SECRET, previous_secret=OLDER)
    assert rotated.validate(sign(claims(), OLDER)).user_id == USER
    with pytest.raises(IdentityInvalidSignatureError):
        Hs256JwtIdentityProvider(active_secret=OLDER).validate(rotated.issue_token(claims()))


def test_an_issued_token_is_valid_and_a_bad_one_is_not_handed_out(provider: Hs256JwtIdentityProvider) -> None:
    assert provider.validate(provider.issue_token(claims())).tenant_id == TENANT
    with pytest.raises(IdentityMalformedError):
        provider.issue_token(claims(scopes="plm.admin"))
    for value in (USER, {"plm.admin"}, b"x", "\ud800", float("nan")):
        with pytest.raises(IdentityMalformedError):
            provider.issue_token(claims(sub=value))


def test_an_expired_token_names_its_verified_tenant(provider: Hs256JwtIdentityProvider) -> None:
    with pytest.raises(IdentityExpiredError) as caught:
        provider.validate(sign(claims(iat=1_000_000, exp=1_000_600)))
    assert (caught.value.code, caught.value.reason, caught.value.tenant_id) == ("IDENTITY_EXPIRED", "expired", TENANT)


def test_a_forged_token_names_no_tenant(provider: Hs256JwtIdentityProvider) -> None:
    with pytest.raises(IdentityInvalidSignatureError) as caught:
        provider.validate(sign(claims(), OLDER))
    assert (caught.value.reason, caught.value.tenant_id) == ("bad_signature", None)


FUTURE = int(time.time()) + 5_000
WRONG_CLAIMS = [
    *[({name: ...}, "missing_claim") for name in ("sub", "tenant_id", "actor_kind", "scopes", "exp", "iat")],
    ({"tenant_id": None}, "missing_claim"),
    ({"actor_kind": "root"}, "invalid_actor_kind"),
    ({"actor_kind": ["human"]}, "invalid_actor_kind"),
    ({"scopes": "plm.admin"}, "invalid_claim"),
    ({"scopes": [1]}, "invalid_claim"),
    ({"scopes": ["two words"]}, "invalid_claim"),
    ({"scopes": ["line\n"]}, "invalid_claim"),
    ({"scopes": {"plm.admin": True}}, "invalid_claim"),
    ({"sub": "nobody"}, "invalid_claim"),
    ({"sub": 7}, "invalid_claim"),
    ({"tenant_id": "acme"}, "invalid_claim"),
    ({"tenant_id": [str(TENANT)]}, "invalid_claim"),
    ({"sub": f"{{{USER}}}"}, "invalid_claim"),
    ({"sub": USER.hex}, "invalid_claim"),
    ({"tenant_id": f"{{{TENANT}}}"}, "invalid_claim"),
    ({"tenant_id": TENANT.urn}, "invalid_claim"),
    ({"tenant_id": f"{TENANT}\n"}, "invalid_claim"),
    ({"exp": "4000000000"}, "invalid_claim"),
    ({"exp": True}, "invalid_claim"),
    ({"exp": float("inf")}, "invalid_claim"),
    ({"iat": float("nan")}, "invalid_claim"),
    ({"iat": -1, "exp": 10}, "invalid_claim"),
    ({"exp": 10**400}, "invalid_claim"),
    ({"nbf": "soon"}, "invalid_claim"),
    ({"session_id": 5}, "invalid_claim"),
    ({"session_id": "a\0b"}, "invalid_claim"),
    ({"exp": FUTURE + 90_000}, "max_lifetime_exceeded"),
    ({"iat": FUTURE, "exp": FUTURE - 1}, "max_lifetime_exceeded"),
    ({"iat": FUTURE, "exp": FUTURE + 60}, "not_yet_valid"),
    ({"nbf": FUTURE}, "not_yet_valid"),
    ({"aud": "somebody-else"}, "wrong_audience"),
    ({"aud": ["a", 1]}, "wrong_audience"),
    ({"jti": 5}, "malformed_token"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG_CLAIMS)
def test_a_signed_token_with_a_wrong_claim_is_malformed(
    provider: Hs256JwtIdentityProvider, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(IdentityMalformedError) as caught:
        provider.validate(raw(b'{"alg":"HS256","typ":"JWT"}', json.dumps(claims(**change)).encode()))
    assert caught.value.reason == reason
    assert caught.value.tenant_id == (None if "tenant_id" in change else TENANT)


@pytest.mark.parametrize("algorithm", ["HS384", "HS512", None])
def test_only_hs256_is_accepted_whatever_the_token_asks_for(
    provider: Hs256JwtIdentityProvider, algorithm: str | None
) -> None:
    with pytest.raises(IdentityMalformedError) as caught:
        provider.validate(sign(claims(), "" if algorithm is None else SECRET, algorithm))
    assert caught.value.reason == "unsupported_algorithm"


HOSTILE = {
    "empty": "",
    "text": "garbage",
    "dots": "..",
    "many dots": "a.b.c.d.e",
    "not ascii": "é.ü.ñ",
    "huge": "a" * 1_000_000,
    "null header": raw(b"null", b"{}"),
    "list header": raw(b"[]", b"{}"),
    "deep header": raw(b"[" * 5_000, b"{}"),
    "deep payload": raw(b'{"alg":"HS256"}', b"[" * 5_000),
    "text payload": raw(b'{"alg":"HS256"}', b'"hello"'),
    "bytes payload": raw(b'{"alg":"HS256"}', b"\xff\xfe"),
    "numeric alg": raw(b'{"alg":5}', b"{}"),
    "list alg": raw(b'{"alg":["HS256"]}', b"{}"),
    "numeric kid": raw(b'{"alg":"HS256","kid":5}', json.dumps(claims()).encode()),
    "unknown crit": raw(b'{"alg":"HS256","crit":["exp"],"exp":1}', json.dumps(claims()).encode()),
    "known crit": raw(b'{"alg":"HS256","crit":["b64"],"b64":true}', json.dumps(claims()).encode()),
    "detached": raw(b'{"alg":"HS256","crit":["b64"],"b64":false}', json.dumps(claims()).encode()),
    "other type": raw(b'{"alg":"HS256","typ":"secevent+jwt"}', json.dumps(claims()).encode()),
    "list type": raw(b'{"alg":"HS256","typ":["JWT"]}', json.dumps(claims()).encode()),
    "surrogate": raw(b'{"alg":"HS256"}', b'{"sub":"\\ud800"}'),
}


@pytest.mark.parametrize("token", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_token_is_a_typed_refusal_that_repeats_nothing_of_it(
    provider: Hs256JwtIdentityProvider, token: str
) -> None:
    with pytest.raises(IdentityMalformedError) as caught:
        provider.validate(token)
    assert str(USER) not in str(caught.value)
    assert caught.value.__cause__ is None


def test_no_mutation_of_a_good_token_escapes_the_error_tree(provider: Hs256JwtIdentityProvider) -> None:
    random.seed(7)
    good = sign(claims())
    for _ in range(2_000):
        letters = list(good)
        for _ in range(random.randint(1, 4)):
            letters[random.randrange(len(letters))] = random.choice("Aa0_-.=é\0 ")
        mutant = "".join(letters)
        try:
            provider.validate(mutant)
        except IdentityValidationError:
            continue
        assert jwt.decode(mutant, SECRET, ["HS256"])["sub"] == str(USER)  # only an equal signature's other spelling


def test_issuer_and_audience_are_checked_when_configured() -> None:
    strict = Hs256JwtIdentityProvider(active_secret=SECRET, issuer="plm", audience="engine")
    assert strict.validate(strict.issue_token(claims())).user_id == USER
    for change, reason in (
        ({}, "missing_claim"),
        ({"iss": "plm"}, "missing_claim"),
        ({"iss": "other", "aud": "engine"}, "wrong_issuer"),
        ({"iss": "plm", "aud": "other"}, "wrong_audience"),
    ):
        with pytest.raises(IdentityMalformedError) as caught:
            strict.validate(sign(claims(**change)))
        assert caught.value.reason == reason, change


def test_the_clocks_may_be_apart_by_the_leeway_and_no_more() -> None:
    now = int(time.time())
    ahead, late = sign(claims(iat=now + 60, nbf=now + 60)), sign(claims(iat=now - 600, exp=now - 60))
    settings = {"PLM_IDENTITY_HS256_SECRET": SECRET, "PLM_IDENTITY_LEEWAY_SECONDS": "110"}
    wide, exact = Hs256JwtIdentityProvider.from_environment(settings), Hs256JwtIdentityProvider(active_secret=SECRET)
    assert [wide.validate(token).user_id for token in (ahead, late)] == [USER, USER]
    with pytest.raises(IdentityMalformedError) as caught:
        exact.validate(ahead)
    assert caught.value.reason == "not_yet_valid"
    with pytest.raises(IdentityExpiredError):
        exact.validate(late)


@pytest.mark.parametrize(
    "environment",
    [
        "production",
        "prod",
        " Production ",
        "PROD\n",
        "live",
        "prd",
        "prod-eu",
        "production.staging",
        "staging",
        " Staging\n",
        "Production-eu",
        "prod-dev",
        "dev,prod",
        "t e s t",
        "\u200bdev",
        "  ",
        "développement",
        "",
    ],
)
def test_production_by_whatever_name_refuses_shared_secrets(environment: str) -> None:
    with pytest.raises(IdentityProviderConfigError, match=r"ENVIRONMENT=.*production: .*local.*IDENTITY_PROVIDER_MODE"):
        Hs256JwtIdentityProvider(active_secret=SECRET, environment=environment)


@pytest.mark.parametrize("environment", ["development", "dev", "local", "test", "ci", " Local\n", "TEST"])
def test_an_environment_that_is_none_of_production_takes_shared_secrets(environment: str) -> None:
    provider = Hs256JwtIdentityProvider(active_secret=SECRET, environment=environment)
    assert provider.validate(sign(claims())).user_id == USER


def test_a_short_secret_is_refused_without_repeating_it() -> None:
    for settings in ({"active_secret": "short-secret"}, {"active_secret": SECRET, "previous_secret": "short-secret"}):
        with pytest.raises(IdentityProviderConfigError, match="has 12 bytes; it needs at least 32 ") as caught:
            Hs256JwtIdentityProvider(**settings)  # type: ignore[arg-type]
        assert "short-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("a" * 40, "repeats itself"),
        ("deadbeef" * 8, "repeats itself"),
        ("0123456789abcdef" * 2, "repeats itself"),
        ("abcdefghijklmnopqrstuvwxyz0123456789", "follows a sequence"),
        ("change-me-in-production-or-else-you-lose", "placeholder 'changeme'"),
        ("a-string-secret-at-least-256-bits-long", "placeholder 'atleast256bits'"),
        ("My_Super_Secret.Key-for.the=platform/42", "placeholder 'secretkey'"),
        ("9a\udcff\udcfe7f3kq0vX2mPz8LwYc5RtB1nHd6GsJ", "is no UTF-8 text"),
    ],
)
def test_a_secret_that_is_plainly_not_random_is_refused_without_repeating_it(secret: str, reason: str) -> None:
    for settings in ({"active_secret": secret}, {"active_secret": SECRET, "previous_secret": secret}):
        with pytest.raises(IdentityProviderConfigError, match=reason) as caught:
            Hs256JwtIdentityProvider(**settings)  # type: ignore[arg-type]
        assert secret not in str(caught.value)


@pytest.mark.parametrize("make", [lambda: secrets.token_hex(16), lambda: secrets.token_urlsafe(24)])
def test_a_random_secret_of_the_least_size_is_accepted(make: Callable[[], str]) -> None:
    for _ in range(1_000):
        Hs256JwtIdentityProvider(active_secret=make())


@pytest.mark.parametrize("mode", ["oidc", "none", "off", "disabled", "false", "0"])
def test_no_mode_switches_identity_off(mode: str) -> None:
    with pytest.raises(IdentityProviderConfigError, match=f"'{mode}'"):
        Hs256JwtIdentityProvider(active_secret=SECRET, identity_provider_mode=mode)


def test_the_environment_configures_the_provider() -> None:
    prefix = "PLM_IDENTITY_HS256_SECRET"
    both = {f"{prefix}_ACTIVE": SECRET, f"{prefix}_PREVIOUS": OLDER}
    assert Hs256JwtIdentityProvider.from_environment(both).validate(sign(claims(), OLDER))
    assert Hs256JwtIdentityProvider.from_environment({prefix: SECRET}).validate(sign(claims()))
    named = {prefix: SECRET, "PLM_IDENTITY_ISSUER": "plm", "PLM_IDENTITY_AUDIENCE": "engine"}
    with pytest.raises(IdentityMalformedError):
        Hs256JwtIdentityProvider.from_environment(named).validate(sign(claims()))
    assert Hs256JwtIdentityProvider.from_environment({prefix: SECRET, "ENVIRONMENT": ""})  # as when it is not set
    blank = {prefix: SECRET, "ENVIRONMENT": " "}
    for broken in ({}, {prefix: ""}, blank, {prefix: SECRET, "ENVIRONMENT": "prod"}, {f"{prefix}_PREVIOUS": OLDER}):
        with pytest.raises(IdentityProviderConfigError):
            Hs256JwtIdentityProvider.from_environment(broken)
