"""The risk of a run: points that add up, and sequences that are found whatever lies between them."""

from __future__ import annotations

import itertools
import json
import random
import uuid
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane import Denied, Pending
from plm_engine_core.control_plane.admission import prepare
from plm_engine_core.control_plane.policy import Facts, PolicySnapshot, Verdict, classify, decide
from plm_engine_core.control_plane.policy.run_risk import GrantedAttempt, RiskPattern, RunRisk, RunSoFar
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import AutonomyLevel, CapabilityMode, OutcomeStatus, RiskLevel
from pydantic import ValidationError

pytestmark = pytest.mark.every_storage

READ = CapabilityDescriptor(id="mail.read", description="x", mode=CapabilityMode.READ, plugin="mail")


@dataclass(frozen=True)
class Proposed:
    """One proposal."""

    capability: str = "mail.read"
    resource: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


def facts(run=None):
    return Facts(
        capability=READ,
        principal_scopes=frozenset(),
        requester=uuid.UUID(int=1),
        autonomy=AutonomyLevel.L3,
        rate_allowed=True,
        run=run,
    )


PATTERN = {"id": "look-then-read", "sequence": ["crm.*", "mail.read"], "gap": 1, "risk": "high"}


def test_points_add_up_with_the_proposal_s_own(make_policy):
    policy = make_policy(run_risk={"points": {"low": 2, "medium": 5, "high": 9}, "raises": {"medium": 6, "high": 10}})
    rated = {points: classify(Proposed(), policy, facts(RunSoFar(points=points))).value for points in (0, 3, 4, 7, 8)}
    assert rated == {0: "low", 3: "low", 4: "medium", 7: "medium", 8: "high"}
    assert classify(Proposed(), policy, facts()) is RiskLevel.LOW


def test_the_decision_names_what_raised_the_risk(make_policy):
    policy = make_policy(
        run_risk={"raises": {"medium": 5}, "patterns": [PATTERN]},
        rules=[{"id": "up", "then": "raise_risk", "risk": "low"}],
    )
    run = RunSoFar(points=9, recent=("crm.find", "x.y"))
    decision = decide(Proposed(), policy, facts(run))
    assert (decision.outcome, decision.rule) == (Verdict.ASK, "auto_approve_max_risk")
    assert decision.raised_by == ("run_risk.raises.medium", "run_risk.patterns.look-then-read")
    assert decision.to_json()["raised_by"] == list(decision.raised_by)
    again = decide(Proposed(), policy, Facts.from_json(json.loads(json.dumps(facts(run).to_json()))))
    assert again == decision


def steps_of(names):
    """Granted attempts, each of a step of its own."""
    return [GrantedAttempt(step, name) for step, name in enumerate(names)]


NAMES = st.lists(st.sampled_from(["a.a", "a.b", "b.a", "b.b"]), min_size=1, max_size=10)
SEQUENCES = st.lists(st.sampled_from(["a.*", "*.a", "b.b", "*"]), min_size=2, max_size=4)


def slow(sequence, gap, names):
    """Every choice of places in order is tried."""
    for places in itertools.combinations(range(len(names)), len(sequence)):
        near = all(later - earlier <= gap + 1 for earlier, later in itertools.pairwise(places))
        fits = all(fnmatchcase(names[place], glob) for place, glob in zip(places, sequence, strict=True))
        if near and fits and places[-1] == len(names) - 1:
            return True
    return False


@given(SEQUENCES, st.integers(0, 3), NAMES)
def test_a_sequence_is_found_exactly_where_trying_everything_finds_it(sequence, gap, names):
    pattern = RiskPattern(id="p", sequence=sequence, gap=gap, risk="high")
    assert pattern.ends_with(names) is slow(sequence, gap, names)


@given(SEQUENCES, st.integers(0, 3), NAMES)
def test_what_is_kept_of_a_run_is_enough_for_its_patterns(sequence, gap, names):
    rating = RunRisk(patterns=[{"id": "p", "sequence": sequence, "gap": gap, "risk": "high"}])
    *earlier, last = names
    kept = rating.project(steps_of(earlier), lambda _: RiskLevel.LOW)
    assert len(kept.recent) <= (len(sequence) - 1) * (gap + 1)
    assert bool([*rating.raised(kept, last, RiskLevel.LOW)]) is slow(sequence, gap, names)


@pytest.mark.parametrize(
    ("run_risk", "message"),
    [
        ({}, "give raises or patterns"),
        ({"raises": {"medium": 5}, "points": {"low": 1}}, "points are missing for medium, high"),
        ({"patterns": [PATTERN, PATTERN]}, "patterns has look-then-read twice"),
        ({"patterns": [{**PATTERN, "sequence": ["a.*"]}]}, "at least 2 items"),
        ({"patterns": [{**PATTERN, "gap": 51}]}, "less than or equal to 50"),
        ({"raises": {"medium": -1}}, "greater than or equal to 0"),
    ],
)
def test_a_rating_that_cannot_mean_anything_is_refused(make_policy, run_risk, message):
    with pytest.raises(ValidationError, match=message):
        make_policy(run_risk=run_risk)


def test_it_is_part_of_the_digest_and_survives_json(make_policy):
    rated = make_policy(run_risk={"raises": {"high": 3}, "patterns": [PATTERN]})
    assert rated.digest != make_policy().digest
    again = PolicySnapshot.model_validate_json(rated.model_dump_json())
    assert (again, again.digest) == (rated, rated.digest)


async def test_a_run_is_rated_from_its_record_and_refused_steps_do_not_count(bench):
    pattern = {"id": "fire-then-read", "sequence": ["thing.fire", "thing.read"], "gap": 1, "risk": "high"}
    strict = bench.with_policy(run_risk={"raises": {"medium": 100}, "patterns": [pattern]})
    lease = await strict.lease()
    await strict.grant(lease, step_index=0)
    await strict.grant(lease, step_index=1, capability="thing.fire")
    await strict.control_plane.admit(strict.proposal(lease, step_index=2, capability="thing.gone"))
    asked = await strict.control_plane.admit(strict.proposal(lease, step_index=3))
    assert isinstance(asked, Pending)
    step = (await strict.storage.runs.steps(strict.tenant, lease.run.id))[-1]
    assert step.decision["raised_by"] == ["run_risk.patterns.fire-then-read"]
    assert step.decision["facts"]["run"] == {"points": 2, "recent": ["thing.read", "thing.fire"]}
    fresh = await strict.lease()
    assert await strict.grant(fresh, step_index=0)


@given(st.lists(st.sampled_from(list(RiskLevel)), max_size=30), st.integers(0, 30), st.tuples(*[st.integers(0, 9)] * 3))
def test_a_run_that_is_too_long_to_be_looked_at_whole_is_never_rated_lower_than_it_is(steps, looked_at, points):
    points = dict(zip(RiskLevel, points, strict=True))
    rating = RunRisk(points=points, raises={"high": 1})
    newest = [level.value for level in steps[max(0, len(steps) - looked_at) :]]
    kept = rating.project(steps_of(newest), RiskLevel, unseen=len(steps) - len(newest))
    assert kept.points >= sum(points[level] for level in steps)
    if len(newest) == len(steps):
        assert kept.points == sum(points[level] for level in steps)


async def test_what_is_too_long_ago_to_be_looked_at_still_counts(bench, monkeypatch):
    monkeypatch.setattr(prepare, "MOST_ATTEMPTS", 2)
    strict = bench.with_policy(run_risk={"points": {"low": 1, "medium": 1, "high": 1}, "raises": {"medium": 5}})
    lease = await strict.lease()
    for step in range(4):
        await strict.grant(lease, step_index=step)
    assert isinstance(await strict.control_plane.admit(strict.proposal(lease, step_index=4)), Pending)


async def test_a_step_that_is_tried_again_counts_each_time(bench):
    strict = bench.with_policy(run_risk={"points": {"low": 1, "medium": 1, "high": 1}, "raises": {"medium": 4}})
    lease = await strict.lease()
    for attempt in (1, 2, 3):
        grant = await strict.begun(lease, attempt=attempt)
        await strict.settle(grant, lease, OutcomeStatus.FAILED)
    assert isinstance(await strict.control_plane.admit(strict.proposal(lease, attempt=4)), Pending)


async def test_in_whichever_order_its_steps_are_numbered_each_counts(bench):
    points = {"points": {"low": 1, "medium": 1, "high": 1}, "raises": {"medium": 4}}
    strict = bench.with_policy(run_risk=points)
    lease = await strict.lease()
    for step in (9, 8, 7):
        await strict.grant(lease, step_index=step)
    assert isinstance(await strict.control_plane.admit(strict.proposal(lease, step_index=6)), Pending)


def test_in_a_sequence_retries_fill_no_gap():
    rating = RunRisk(patterns=[PATTERN])
    tried = [(0, "crm.find"), (1, "x.y"), (1, "x.y"), (1, "x.y")]
    kept = rating.project([GrantedAttempt(*each) for each in tried], lambda _: RiskLevel.LOW)
    assert kept == RunSoFar(points=4, recent=("crm.find", "x.y"))
    assert [place for _, place in rating.raised(kept, "mail.read", RiskLevel.LOW)] == [
        "run_risk.patterns.look-then-read"
    ]


def granted_by(events):
    """Every attempt that was granted and not given back unused, folded from a run's events alone."""
    granted = {}
    for event in events:
        told = json.loads(event.payload)
        if event.kind == "step_granted":
            granted[told["step"], told["attempt"]] = told["capability"]
        elif event.kind == "step_settled" and told["status"] == "not_started":
            granted.pop((told["step"], told["attempt"]), None)
    return granted


async def test_the_record_of_a_run_s_steps_is_what_its_events_say(bench):
    """Denied, unused, repeated and failed ones among them, in many orders."""
    dice = random.Random(11)  # a test that can be repeated
    for _ in range(6):
        lease = await bench.lease()
        for step in dice.choice([range(8), range(8)[::-1]]):  # whoever makes the calls numbers them
            for attempt in (1, 2):
                how = dice.choice(["denied", "unused", "failed", "superseded", "held"])
                if how == "denied":
                    gone = bench.proposal(lease, step_index=step, attempt=attempt, capability="thing.gone")
                    assert isinstance(await bench.control_plane.admit(gone), Denied)
                    continue
                name = dice.choice(["thing.read", "thing.fire"])
                grant = await bench.grant(lease, step_index=step, attempt=attempt, capability=name)
                if how == "unused":
                    await bench.settle(grant, lease, OutcomeStatus.NOT_STARTED)
                elif how != "held":
                    await bench.control_plane.begin(grant, fencing_token=lease.fencing_token, actor="worker:w")
                    await bench.settle(grant, lease, OutcomeStatus(how))
                events = await bench.storage.events.read(bench.tenant, f"run/{lease.run.id}")
                granted = granted_by(events)
                for beside, limit in (((99, 1), 99), ((step, attempt), 3)):
                    said = [GrantedAttempt(place[0], name) for place, name in granted.items() if place != beside]
                    older = max(0, len(said) - limit)
                    history = bench.storage.admission.history
                    found = await history(bench.tenant, lease.run.id, beside=beside, limit=limit)
                    assert found == (said[older:], older)
