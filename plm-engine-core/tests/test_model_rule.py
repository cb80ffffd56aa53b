"""Which language models a call may name: by model, model tier, action tier and user."""

from __future__ import annotations

import json
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.policy import read_policy
from plm_engine_core.control_plane.policy.models import ModelRule
from plm_engine_core.control_plane.vocabulary import ActionTier
from pydantic import ValidationError

ASKS, AUTO = ActionTier.ALWAYS_APPROVE, ActionTier.AUTO_APPROVE
ANYBODY, ADA, BEN = (uuid.UUID(int=number) for number in range(3))

RULE = {
    "allowed": ["house-*", "mini-*", "lab-*"],
    "tiers": {"trusted": ["HOUSE-*"], "standard": ["mini-*", "house-*"]},
    "by_tier": {"always_approve": ["trusted"]},
    "users": {str(ADA): {"allowed": ["secret-*"]}, str(BEN): {"tiers": ["standard"]}},
}


@pytest.mark.parametrize(
    ("model", "tier", "user", "rule"),
    [
        ("mini-1", AUTO, ANYBODY, None),
        (" LAB-1 ", AUTO, ANYBODY, None),
        ("other", AUTO, ANYBODY, "models.allowed"),
        (None, AUTO, ANYBODY, "models.allowed"),
        ("House-1", ASKS, ANYBODY, None),
        ("mini-1", ASKS, ANYBODY, "models.by_tier.always_approve"),
        ("lab-1", ASKS, ANYBODY, "models.by_tier.always_approve"),
        ("secret-1", AUTO, ANYBODY, "models.allowed"),
        ("secret-1", ASKS, ADA, None),
        ("house-1", AUTO, ADA, f"models.users.{ADA}.allowed"),
        (None, AUTO, ADA, f"models.users.{ADA}.allowed"),
        ("mini-1", ASKS, BEN, None),
        ("house-1", AUTO, BEN, f"models.users.{BEN}.tiers"),
        ("other", AUTO, BEN, f"models.users.{BEN}.tiers"),
    ],
)
def test_a_model_is_refused_where_the_policy_says_so(model, tier, user, rule):
    refusal = ModelRule(**RULE).refuses(model, tier=tier, user=user)
    assert (refusal and refusal.rule) == rule
    assert refusal is None or refusal.unblock.startswith("a model")


def test_a_model_that_no_tier_lists_is_of_the_default_tier_where_there_is_one():
    assert ModelRule(**RULE).tier_of("lab-1") is None
    rule = ModelRule(**RULE, default_tier="standard")
    assert rule.tier_of("lab-1") == "standard"
    assert rule.tier_of("house-1") == "trusted"
    assert rule.refuses("lab-1", tier=ASKS, user=ANYBODY) is not None


def test_a_name_that_is_too_long_to_be_matched_is_of_no_tier():
    rule = ModelRule(**{**RULE, "default_tier": "trusted", "allowed": ["*"]})
    assert rule.tier_of("x" * 70_000) is None
    assert rule.refuses("x" * 70_000, tier=ASKS, user=ANYBODY) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"by_tier": {"always_approve": ["trusty"]}}, "by_tier.always_approve names the model tier 'trusty'"),
        ({"default_tier": "trusty"}, "default_tier names the model tier 'trusty'"),
        ({"users": {str(ADA): {"tiers": ["trusty"]}}}, f"users.{ADA}.tiers names the model tier 'trusty'"),
        ({"by_tier": {"sometimes": []}}, "by_tier"),
        ({"allowed": [""]}, "the pattern is empty"),
        ({"tiers": {"trusted": [" "], "standard": []}}, "the pattern is empty"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        ModelRule(**{**RULE, **changes})


def test_what_is_not_said_of_models_leaves_the_digest_as_it_was(make_policy):
    plain = make_policy(models={"allowed": ["small"]})
    assert json.loads(plain.content)["models"] == {"allowed": ["small"]}
    told = make_policy(models=RULE)
    assert told.digest != plain.digest
    assert read_policy(told.content, source="test") == told


@given(
    st.sampled_from(["house-1", "mini-1", "lab-1", "other", None]),
    st.sampled_from(ActionTier),
    st.lists(st.sampled_from(["trusted", "standard"])),
)
def test_to_restrict_an_action_tier_never_allows_more(model, tier, names):
    free = ModelRule(**{**RULE, "by_tier": {}})
    bound = ModelRule(**{**RULE, "by_tier": {tier.value: names}})
    if free.refuses(model, tier=tier, user=ANYBODY) is not None:
        assert bound.refuses(model, tier=tier, user=ANYBODY) is not None
