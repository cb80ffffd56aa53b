"""Windows of budgets in the time zones of their subjects: when they begin and end; no change gives a budget anew."""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, Principal
from plm_engine_core.control_plane.errors import InvalidRequest, NotFound
from plm_engine_core.control_plane.events import rebuild
from plm_engine_core.control_plane.limits import BudgetKey, Reserve, windows
from plm_engine_core.control_plane.policy.snapshot import load_policy, read_policy
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.storage.memory.budgets import reserve
from plm_engine_core.control_plane.storage.ports import Correction
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.storage.postgres.gateway import jsonb
from plm_engine_core.control_plane.vocabulary import BudgetScope, Period, Reason
from plm_engine_core.control_plane.why import why
from plm_engine_core.testing.clock import FakeClock

pytestmark = pytest.mark.every_storage

SOAK = float(os.environ.get("SOAK", "0.05"))
OPERATOR = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.budgets"}))
KEY = BudgetKey.of(BudgetScope.AGENT, "test", "calls", Period.DAY)
ZONES = [
    "UTC",
    "Europe/Berlin",
    "Europe/London",
    "America/New_York",
    "America/Havana",  # set back from 1:00 to 0:00
    "America/Santiago",  # no midnight when it is set forward
    "Asia/Beirut",  # the same, and set back at midnight to 23:00
    "Atlantic/Azores",  # both
    "Asia/Kolkata",
    "Australia/Lord_Howe",  # by half an hour
    "Pacific/Chatham",  # 12:45 ahead
    "Pacific/Kiritimati",
    "Pacific/Pago_Pago",
]
CHANGES = [  # days on which clocks were set
    date(2022, 3, 13),
    date(2022, 3, 27),
    date(2022, 4, 3),
    date(2022, 9, 11),
    date(2022, 10, 2),
    date(2022, 10, 30),
    date(2022, 11, 6),
]
STRANGE = [
    ("America/St_Johns", date(2010, 11, 7)),
    ("Pacific/Apia", date(2011, 12, 30)),
    ("America/Toronto", date(1919, 3, 31)),
]
"""Set back from 0:01 to 23:01; a day left out; set forward from 23:30 to 0:30."""

# The database's clock, for whoever asks for it by its name alone.
CLOCK = """
CREATE TABLE told_time (at timestamptz NOT NULL);
INSERT INTO told_time VALUES (now());
GRANT SELECT ON told_time TO PUBLIC;
CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT at FROM public.told_time';
DO $$
DECLARE v_function regprocedure;
BEGIN
    FOR v_function IN SELECT oid::regprocedure FROM pg_proc WHERE proname LIKE 'engine\\_%' AND prokind = 'f' LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = public, pg_catalog, pg_temp', v_function);
    END LOOP;
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END
$$;
"""


class Place:
    """A bench whose clock a test moves."""

    def __init__(self, bench, clock=None):
        self.bench, self._clock = bench, clock

    def go(self, moment):
        """Let it be that moment by the clock of the books."""
        if self._clock:
            self._clock.move((moment - self._clock()).total_seconds())
        else:
            self.bench.sql("UPDATE told_time SET at = %s", moment)

    def under(self, make_policy, *limits, **policy):
        """The bench under a policy, with a limit of two calls a day for each agent where none is given."""
        plane, rule = self.bench.control_plane, make_policy(limits=limits or [per_day(2, "agent")], **policy)
        changed = ControlPlane(policy=rule, registry=plane.registry, storage=plane.storage)
        return replace(self.bench, control_plane=changed)

    async def reserve(self, *entries):
        """What the books answer to a command that sets these aside."""
        stored, storage = [each.stored for each in entries], self.bench.storage
        if self._clock:
            async with storage.books.turn() as books:
                return reserve(books, self.bench.tenant, stored)
        async with storage.budgets._gateway.transaction(self.bench.tenant) as connection:
            asked = [self.bench.tenant, jsonb(stored, root="reserve")]
            cursor = await connection.execute("SELECT engine_reserve_v4(%s, %s) AS answer", asked)
            return (await cursor.fetchone())["answer"]

    async def present(self, key=KEY):
        """The budget as it is shown, or None."""
        found = await self.bench.storage.budgets.list(
            self.bench.tenant, limit=9, scope=key.scope, scope_id=key.scope_id
        )
        assert len({each.key for each in found}) == len(found)
        return next((each for each in found if each.key == key), None)


@pytest.fixture
async def place(bench, storage_kind):
    if storage_kind == "memory":
        clock = FakeClock()
        storage = MemoryStorage(clock=clock)
        tenant = storage.add_tenant(bench.tenant)
        plane = ControlPlane(policy=bench.control_plane.policy, registry=bench.control_plane.registry, storage=storage)
        yield Place(replace(bench, control_plane=plane, tenant=tenant), clock)
        return
    bench.sql(CLOCK)
    async with open_pool(bench.database.app, max_size=20) as pool:
        storage = PostgresStorage(pool, bench.storage.runs._delivery)
        plane = ControlPlane(policy=bench.control_plane.policy, registry=bench.control_plane.registry, storage=storage)
        yield Place(replace(bench, control_plane=plane))


def per_day(amount, scope):
    return {"scope": scope, "per": "day", "unit": "calls", "limit": amount}


def entry(zone, amount, limit, period=Period.DAY):
    return Reserve(
        scope=KEY.scope,
        scope_id=KEY.scope_id,
        unit=KEY.unit,
        amount=Decimal(amount),
        period=period,
        subject=KEY.subject,
        limit=Decimal(limit),
        time_zone=None if zone == "UTC" else zone,
    )


def local(zone, year, month, day, hour=0, minute=0, **more):
    return datetime(year, month, day, hour, minute, tzinfo=ZoneInfo(zone), **more).astimezone(UTC)


def named(period, zone, moment):
    """The day, week or month that a calendar at that place shows."""
    day = moment.astimezone(ZoneInfo(zone)).date()
    return {"day": day, "week": day.isocalendar()[:2], "month": (day.year, day.month)}[period]


def moments(around, step=timedelta(minutes=30)):
    first = datetime(around.year, around.month, around.day, tzinfo=UTC) - timedelta(days=2)
    return [first + step * number for number in range(int(timedelta(days=4) / step))]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("period", ["day", "week", "month"])
def test_a_window_is_what_a_calendar_at_that_place_shows(zone, period):
    lengths = set()
    for moment in (each for around in CHANGES for each in moments(around)):
        starts, ends = windows.window_of(period, zone, moment)
        assert starts <= moment < ends
        name, tick = named(period, zone, moment), timedelta(microseconds=1)
        assert [named(period, zone, each) == name for each in (starts - tick, starts, ends - tick, ends)] == [
            False,
            True,
            True,
            False,
        ]
        lengths.add((ends - starts) / timedelta(hours=1))
    if zone == "Europe/Berlin" and period == "day":
        assert lengths == {23, 24, 25}


@pytest.mark.parametrize(("zone", "around"), STRANGE, ids=[zone for zone, _ in STRANGE])
@pytest.mark.parametrize("period", ["day", "week", "month"])
def test_windows_follow_each_other_whatever_is_done_to_a_clock(zone, around, period):
    found = [windows.window_of(period, zone, each) for each in moments(around, timedelta(minutes=10))]
    for before, after in pairwise(found):
        assert after == before or after[0] == before[1]


def test_windows_in_utc_need_no_time_zone_data(monkeypatch):
    monkeypatch.setattr(windows, "ZoneInfo", None)
    at = datetime(2022, 2, 28, 23, 59, tzinfo=UTC)
    ends = datetime(2022, 3, 1, tzinfo=UTC)
    assert windows.window_of("month", "UTC", at) == (datetime(2022, 2, 1, tzinfo=UTC), ends)


@pytest.mark.postgres_only
def test_the_database_counts_windows_as_this_package_does(bench):
    strange = [(zone, each) for zone, around in STRANGE for each in moments(around, timedelta(minutes=10))]
    usual = [(zone, each) for zone in ZONES for around in CHANGES for each in moments(around)]
    dice = random.Random(3)
    anywhere = [
        (dice.choice(ZONES), datetime(2022, 1, 1, tzinfo=UTC) + timedelta(seconds=dice.randrange(365 * 86_400)))
        for _ in range(2000)
    ]
    asked = [(period, *each) for period in ("day", "week", "month") for each in (*strange, *usual, *anywhere)]
    told = bench.sql(
        "SELECT w.starts_at, w.ends_at FROM unnest(%s::text[], %s::text[], %s::timestamptz[]) WITH ORDINALITY "
        "AS a (period, zone, at, place), LATERAL engine_window_of_v1(period, zone, at) AS w ORDER BY place",
        *map(list, zip(*asked, strict=True)),
    )
    wrong = [each for each, window in zip(asked, told, strict=True) if window != windows.window_of(*each)]
    assert wrong == []


class Oracle:
    """One subject's windows, as plain words have them: while one runs it is the one, else a calendar says the next."""

    def __init__(self):
        self.zone, self.starts, self.ends = "", *[datetime.min.replace(tzinfo=UTC)] * 2

    def go(self, moment, zone, period):
        if not self.starts <= moment < self.ends:
            before = self.zone, self.ends
            self.zone, (self.starts, self.ends) = zone, windows.window_of(period, zone, moment)
            assert zone != before[0] or self.starts >= before[1], "windows of one zone overlap"


@pytest.mark.parametrize("seed", range(max(3, int(SOAK * 100))))
@pytest.mark.parametrize("period", [Period.DAY, Period.WEEK, Period.MONTH], ids=["day", "week", "month"])
async def test_no_change_of_zone_gives_more_than_a_limit_in_a_window_that_runs(place, period, seed):
    """Random moments, zones and amounts: what is set aside and spent in a window never exceeds its limit."""
    dice, oracle, limit, key = random.Random(f"{period}{seed}"), Oracle(), 10, replace(KEY, period=period)
    budgets, tenant = place.bench.storage.budgets, place.bench.tenant
    longest = {"day": 1, "week": 7, "month": 31}[period] * 86_400
    moment = datetime(2022, 1, 1, tzinfo=UTC) + timedelta(seconds=dice.randrange(365 * 86_400))
    zone, used, refused = "UTC", Counter(), 0
    for number in range(60):
        moment += timedelta(seconds=dice.choice([0, dice.randrange(longest // 8), dice.randrange(longest)]))
        zone = dice.choice(ZONES) if dice.random() < 0.4 else zone
        place.go(moment)
        oracle.go(moment, zone, period)
        if dice.random() < 0.2:
            there = None if zone == "UTC" else zone
            said = await budgets.set_limit(tenant, key, Decimal(limit), time_zone=there, actor="test")
            assert (said.starts_at, said.ends_at, said.time_zone) == (oracle.starts, oracle.ends, oracle.zone)
        amount = dice.randrange(0, 7)
        answer = await place.reserve(entry(zone, amount, limit, period))
        if used[oracle.starts] + amount <= limit:
            (entered,) = answer["reserved"]
            assert datetime.fromisoformat(entered["starts_at"]) == oracle.starts
            assert entered.get("time_zone", "UTC") == zone
            used[oracle.starts] += amount
        else:
            refused += 1
            assert answer["reason"] == "budget_exceeded"
            assert datetime.fromisoformat(answer["limit"]["ends_at"]) == oracle.ends
        if dice.random() < 0.2 and used[oracle.starts] < limit:
            said = {"key": key, "amount": Decimal(1), "reason": "x", "command_id": str(number), "digest": str(number)}
            assert (await budgets.correct(tenant, Correction(**said), actor="test")).starts_at == oracle.starts
            used[oracle.starts] += 1
        shown = await place.present(key)
        assert (shown.starts_at, shown.ends_at, shown.time_zone) == (oracle.starts, oracle.ends, oracle.zone)
        assert shown.spent + shown.reserved == used[oracle.starts] <= limit
    assert refused


@pytest.mark.postgres_only
async def test_who_counts_in_different_zones_at_once_opens_one_window(bench, storage_kind):
    """As where nodes with different policy files meet in one budget that nobody has drawn on yet."""
    place = Place(bench)
    zones = ["UTC", "America/New_York", "Asia/Tokyo", "Pacific/Pago_Pago"] * 5
    for number in range(10):
        key = BudgetKey.of(BudgetScope.AGENT, f"agent{number}", "calls", Period.DAY)
        entries = [replace(entry(zone, 1, 7), scope_id=key.scope_id, subject=key.subject) for zone in zones]
        answers = await asyncio.gather(*map(place.reserve, entries))
        starts = {each["reserved"][0]["starts_at"] for each in answers if "reserved" in each}
        assert (len(starts), sum("reserved" in each for each in answers)) == (1, 7)


async def test_the_window_of_each_is_in_its_own_zone(place, make_policy):
    bench = place.bench
    bench = place.under(
        make_policy,
        per_day(9, "user"),
        per_day(9, "agent"),
        per_day(9, "team"),
        per_day(9, "tenant"),
        teams={"night": [str(bench.requester.user_id)]},
        time_zone="Europe/Berlin",
        time_zones=[
            {"scope": "user", "subject": str(bench.requester.user_id).upper(), "time_zone": "Asia/Kolkata"},
            {"scope": "agent", "subject": "test", "time_zone": "UTC"},
            {"scope": "tenant", "subject": str(bench.tenant), "time_zone": "America/Havana"},
        ],
    )
    place.go(datetime(2022, 11, 6, 12, tzinfo=UTC))
    lease = await bench.lease()
    grant = await bench.grant(lease)
    shown = [each for each in await bench.storage.runs.budgets(bench.tenant, lease.run.id) if each.starts_at]
    told = {each.scope.value: (each.starts_at, each.ends_at, each.time_zone) for each in shown}
    havana = (local("America/Havana", 2022, 11, 6), local("America/Havana", 2022, 11, 7), "America/Havana")
    assert told == {
        "user": (local("Asia/Kolkata", 2022, 11, 6), local("Asia/Kolkata", 2022, 11, 7), "Asia/Kolkata"),
        "agent": (datetime(2022, 11, 6, tzinfo=UTC), datetime(2022, 11, 7, tzinfo=UTC), "UTC"),
        "team": havana,
        "tenant": havana,
    }
    assert havana[1] - havana[0] == timedelta(hours=25)
    assert (await bench.begin(grant, lease)).accepted
    place.go(local("America/Havana", 2022, 11, 7, 1))
    again = await bench.lease()
    await bench.grant(again)
    await bench.settle(grant, lease)
    present = await place.present(BudgetKey.of(BudgetScope.TENANT, str(bench.tenant), "calls", Period.DAY))
    assert (present.starts_at, present.spent, present.reserved) == (havana[1], 0, 1)
    assert (await rebuild(bench.storage, bench.tenant))[1] == []


async def test_who_is_refused_is_told_when_the_window_ends_where_they_are(place, make_policy):
    zone = "Australia/Lord_Howe"
    bench = place.under(make_policy, time_zone=zone)
    place.go(local(zone, 2022, 4, 2, 23, 59))
    lease = await bench.lease()
    answers = [await bench.control_plane.admit(bench.proposal(lease, step_index=step)) for step in range(3)]
    assert isinstance(answers[1], Granted)
    denied, ends = answers[2], local(zone, 2022, 4, 3)
    assert (denied.reason, denied.limit["time_zone"]) == (Reason.BUDGET_EXCEEDED, zone)
    assert datetime.fromisoformat(denied.limit["ends_at"]) == ends
    assert denied.unblock.endswith(f"waiting until {denied.limit['ends_at']}")
    said = await why(bench.storage, bench.tenant, "agent/test/calls/day")
    assert (said.limit["time_zone"], datetime.fromisoformat(said.limit["ends_at"])) == (zone, ends)
    assert f"of this day in {zone}" in said.message
    assert f"the next day, from {ends:%Y-%m-%d %H:%M:%S} UTC" in said.unblocked_by
    place.go(ends)
    assert isinstance(await bench.control_plane.admit(bench.proposal(await bench.lease())), Granted)


async def test_a_policy_of_another_zone_gives_nothing_anew_while_a_window_runs(place, make_policy):
    place.go(datetime(2022, 7, 1, 12, tzinfo=UTC))
    taken = place.under(make_policy)
    lease = await taken.lease()
    for step in range(2):
        await taken.grant(lease, step_index=step)
    for number, zone in enumerate(["Pacific/Kiritimati", "America/New_York", "Asia/Kolkata"]):
        place.go(datetime(2022, 7, 1, 17 + number, tzinfo=UTC))
        bench = place.under(make_policy, time_zone=zone)
        denied = await bench.control_plane.admit(bench.proposal(await bench.lease()))
        assert isinstance(denied, Denied)
        assert datetime.fromisoformat(denied.limit["ends_at"]) == datetime(2022, 7, 2, tzinfo=UTC)
    place.go(datetime(2022, 7, 2, tzinfo=UTC))
    await bench.grant(await bench.lease())
    present = await place.present()
    assert (present.starts_at, present.time_zone) == (local("Asia/Kolkata", 2022, 7, 2), "Asia/Kolkata")
    back = place.under(make_policy)
    place.go(datetime(2022, 7, 2, 18, 29, tzinfo=UTC))
    await back.grant(await back.lease())
    denied = await back.control_plane.admit(back.proposal(await back.lease()))
    assert datetime.fromisoformat(denied.limit["ends_at"]) == local("Asia/Kolkata", 2022, 7, 3)


async def test_a_window_that_began_at_the_same_moment_in_another_zone_goes_on_as_that_of_this_one(place):
    """March in London is an hour shorter than in UTC, and begins with it."""
    place.go(datetime(2022, 3, 10, tzinfo=UTC))
    assert "reserved" in await place.reserve(entry("Europe/London", 3, 4, Period.MONTH))
    key = replace(KEY, period=Period.MONTH)
    assert (await place.present(key)).ends_at == datetime(2022, 3, 31, 23, tzinfo=UTC)
    place.go(datetime(2022, 3, 31, 23, 30, tzinfo=UTC))
    assert await place.present(key) is None
    assert "reserved" in await place.reserve(entry("UTC", 1, 4, Period.MONTH))
    shown = await place.present(key)
    assert (shown.ends_at, shown.time_zone, shown.reserved) == (datetime(2022, 4, 1, tzinfo=UTC), "UTC", 4)
    assert (await place.reserve(entry("UTC", 1, 4, Period.MONTH)))["reason"] == "budget_exceeded"
    place.go(datetime(2022, 4, 1, tzinfo=UTC))
    assert "reserved" in await place.reserve(entry("UTC", 4, 4, Period.MONTH))


async def test_operators_set_and_correct_the_window_that_runs(place, make_policy):
    bench = place.under(make_policy, time_zone="Asia/Kolkata")
    plane, of = bench.control_plane, {"by": OPERATOR}
    place.go(local("Asia/Kolkata", 2022, 7, 2, 1))
    with pytest.raises(NotFound):
        await plane.correct_budget(bench.tenant, KEY, Decimal(1), reason="x", command_id="a", **of)
    made = await plane.set_budget(bench.tenant, KEY, Decimal(5), **of)
    assert (made.starts_at, made.ends_at) == (local("Asia/Kolkata", 2022, 7, 2), local("Asia/Kolkata", 2022, 7, 3))
    assert (made.time_zone, made.limit, made.pinned) == ("Asia/Kolkata", 5, True)
    corrected = await plane.correct_budget(bench.tenant, KEY, Decimal(2), reason="x", command_id="b", **of)
    assert (corrected.starts_at, corrected.spent) == (made.starts_at, 2)
    other = place.under(make_policy, time_zone="America/New_York").control_plane
    again = await other.set_budget(bench.tenant, KEY, Decimal(6), **of)
    assert (again.starts_at, again.spent, again.time_zone) == (made.starts_at, 2, "Asia/Kolkata")
    events = await bench.storage.events.read(bench.tenant, "tenant")
    told = [each.data for each in events if each.kind in ("budget_set", "budget_corrected")]
    assert {each["time_zone"] for each in told} == {"Asia/Kolkata"}
    place.go(made.ends_at)
    with pytest.raises(NotFound):
        await other.correct_budget(bench.tenant, KEY, Decimal(2), reason="x", command_id="c", **of)
    late = await other.correct_budget(bench.tenant, KEY, Decimal(2), reason="x", command_id="b", **of)
    assert (late.starts_at, late.spent) == (made.starts_at, 2)
    assert (await rebuild(bench.storage, bench.tenant))[1] == []


async def test_a_zone_that_the_storage_does_not_know_grants_nothing_and_says_so(place, make_policy, monkeypatch):
    monkeypatch.setattr(windows, "_names", lambda: frozenset({"Nowhere/Land"}))
    bench = place.under(make_policy, time_zone="Nowhere/Land")
    lease = await bench.lease()
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert isinstance(denied, Denied)
    assert (denied.reason, denied.rule) == (Reason.BUDGET_MISSING, "limits.agent.day.calls")
    assert (
        denied.message
        == "the agent's day budget in calls cannot be opened: the storage knows no time zone Nowhere/Land"
    )
    assert "time zone data that know Nowhere/Land" in denied.unblock
    for each in await bench.storage.runs.budgets(bench.tenant, lease.run.id):
        assert (each.spent, each.reserved) == (0, 0)
    with pytest.raises(InvalidRequest, match="the storage knows no time zone Nowhere/Land") as refused:
        await bench.control_plane.set_budget(bench.tenant, KEY, Decimal(5), by=OPERATOR)
    assert refused.value.field == "time_zone"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_zone": "Europe/Berlln"}, "must be UTC or a time zone that is known here"),
        ({"time_zone": "CET"}, "must be UTC or a time zone that is known here"),
        ({"time_zone": "europe/berlin"}, "must be UTC or a time zone that is known here"),
        ({"time_zone": "../../etc/localtime"}, "must be UTC or a time zone that is known here"),
        ({"time_zones": [{"scope": "run", "subject": "x", "time_zone": "UTC"}]}, "a run has no windows"),
        (
            {"time_zones": [{"scope": "user", "subject": "x", "time_zone": "UTC"}]},
            "the subject of a user time zone is its id, a UUID",
        ),
        ({"time_zones": [{"scope": "agent", "time_zone": "UTC"}]}, "subject"),
        (
            {"time_zones": [{"scope": "model", "subject": each, "time_zone": "UTC"} for each in ("Big", "big")]},
            "time_zones has model.big twice",
        ),
    ],
)
def test_a_zone_that_cannot_be_kept_is_refused(make_policy, changes, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**changes)


def test_a_policy_file_with_an_unknown_zone_is_told_where(make_policy, tmp_path):
    file = tmp_path / "policy.yaml"
    written = make_policy().model_dump_json()
    file.write_text(
        written[:-1].replace('"time_zone":null,"time_zones":[],', "")
        + ',\n  "time_zones": [\n    {"scope": "agent", "subject": "a",\n     "time_zone": "Mars/Base"}]}'
    )
    with pytest.raises(InvalidRequest, match=r"policy.yaml:4:6: time_zones.0.time_zone: must be UTC or a time zone"):
        load_policy(file)


def test_a_policy_without_zones_is_the_one_that_it_was(make_policy):
    silent = make_policy()
    assert "time_zone" not in silent.content
    said = make_policy(time_zone="Asia/Kolkata", time_zones=[{"scope": "agent", "subject": "a", "time_zone": "UTC"}])
    assert said.digest != silent.digest
    assert read_policy(said.content, source="x") == said
