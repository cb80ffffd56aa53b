"""What an operator does to budgets: in both storages, and at the terminal."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import time
import uuid
from dataclasses import replace
from datetime import datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from plm_engine_core.cli import build_app
from plm_engine_core.control_plane import Denied, Granted, Principal
from plm_engine_core.control_plane.errors import Forbidden, IdempotencyConflict, InvalidRequest, NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM
from plm_engine_core.control_plane.identity import Hs256JwtIdentityProvider
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.vocabulary import BudgetScope, Period, Reason
from typer.testing import CliRunner

pytestmark = pytest.mark.every_storage

OPERATOR = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.budgets"}))
COUNTED = [
    *({"scope": "agent", "unit": unit, "limit": "9"} for unit in ("calls", "EUR")),
    *({"scope": "agent", "per": per, "unit": "calls", "limit": "9"} for per in ("day", "month")),
    {"scope": "user", "unit": "calls", "limit": "9"},
]
DAILY = BudgetKey.of(BudgetScope.AGENT, "test", "calls", Period.DAY)


def calls_of(bench: Any) -> BudgetKey:
    return BudgetKey(scope=BudgetScope.TENANT, scope_id=bench.tenant, unit="calls")


async def correct(bench: Any, key: BudgetKey, amount: str, **changes: Any) -> Any:
    said = {"reason": "booked twice", "command_id": "c1", "by": OPERATOR, **changes}
    return await bench.control_plane.correct_budget(bench.tenant, key, Decimal(amount), **said)


async def told(bench: Any) -> list[Any]:
    events = await bench.storage.events.read(bench.tenant, TENANT_STREAM)
    return [(event.kind, event.data) for event in events if event.kind.startswith("budget_")]


async def test_a_limit_that_was_set_counts_at_once_and_is_told(bench: Any) -> None:
    lease = await bench.lease()
    await bench.control_plane.set_budget(bench.tenant, calls_of(bench), Decimal(0), by=OPERATOR)
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert isinstance(denied, Denied)
    assert (denied.reason, denied.limit["limit"]) == (Reason.BUDGET_EXCEEDED, "0")
    await bench.control_plane.set_budget(bench.tenant, calls_of(bench), Decimal(1), by=OPERATOR)
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease, step_index=1)), Granted)
    assert [(kind, data["limit"]) for kind, data in await told(bench)] == [("budget_set", "0"), ("budget_set", "1")]


@pytest.mark.postgres_only
async def test_a_limit_that_was_set_holds_for_later_windows_whatever_the_policy_says(bench: Any) -> None:
    bench = bench.with_policy(limits=[{"scope": "agent", "per": "day", "unit": "calls", "limit": 5}])
    lease = await bench.lease()
    await bench.control_plane.set_budget(bench.tenant, DAILY, Decimal(0), by=OPERATOR)
    (budget,) = await bench.storage.budgets.list(bench.tenant, limit=9, scope=BudgetScope.AGENT)
    assert (budget.limit, budget.pinned, budget.subject) == (0, True, "test")
    bench.sql("UPDATE budgets SET starts_at = starts_at - interval '1 day' WHERE period = 'day'")
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert (denied.reason, denied.limit["limit"]) == (Reason.BUDGET_EXCEEDED, "0")
    rows = [each["pinned"] for each in bench.behind.rows("budgets") if each["period"] == "day"]
    assert rows == [True, True], "the new window has it too"


async def test_a_correction_is_a_counter_entry_that_is_booked_once(bench: Any) -> None:
    lease = await bench.lease()
    grant = await bench.begun(lease)
    await bench.settle(grant, lease)
    budgets = [await correct(bench, calls_of(bench), "-1") for _ in range(2)]
    assert [each.spent for each in budgets] == [0, 0]
    assert [(kind, data["amount"], data["reason"]) for kind, data in await told(bench)] == [
        ("budget_corrected", "-1", "booked twice")
    ]
    with pytest.raises(IdempotencyConflict, match="another correction"):
        await correct(bench, calls_of(bench), "1")
    assert (await correct(bench, calls_of(bench), "2.5", command_id="c2")).spent == Decimal("2.5")


async def test_no_more_is_given_back_than_was_spent(bench: Any) -> None:
    await bench.run()
    with pytest.raises(InvalidRequest, match="only 0 calls were spent"):
        await correct(bench, calls_of(bench), "-1")
    assert (await correct(bench, calls_of(bench), "1")).spent == 1, "the refused command was not used up"


@pytest.mark.parametrize("amount", ["0", "NaN", "Infinity", "1e12", "1e999999999", "-1e999999999", "0.000000001"])
async def test_an_amount_that_the_books_cannot_hold_is_refused(bench: Any, amount: str) -> None:
    await bench.run()
    with pytest.raises(InvalidRequest) as caught:
        await correct(bench, calls_of(bench), amount)
    assert caught.value.field == "amount"


@pytest.mark.parametrize("unit", ["eur", "Calls", "TOKENS"])
async def test_a_limit_in_a_unit_that_is_ours_written_otherwise_is_refused(bench: Any, unit: str) -> None:
    """Nothing would ever be counted on it, and whoever set it would think themselves safe."""
    key = BudgetKey.of(BudgetScope.TENANT, str(bench.tenant), unit)
    with pytest.raises(InvalidRequest, match="is written") as caught:
        await bench.control_plane.set_budget(bench.tenant, key, Decimal(1), by=OPERATOR)
    assert caught.value.field == "unit"


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (lambda bench: BudgetKey.of(BudgetScope.TENANT, str(bench.tenant), "EURO"), "budgets.tenant"),
        (lambda bench: BudgetKey.of(BudgetScope.RUN, str(bench.tenant), "tokens"), "budgets.run"),
        (lambda bench: BudgetKey.of(BudgetScope.TENANT, str(bench.tenant), "calls", Period.MONTH), "limits"),
        (lambda _: BudgetKey.of(BudgetScope.AGENT, "test", "calls", Period.WEEK), "limits"),
        (lambda _: BudgetKey.of(BudgetScope.TEAM, "day", "calls"), "limits"),
    ],
)
async def test_a_limit_that_no_call_draws_on_is_refused(bench: Any, key: Any, place: str) -> None:
    """It would stand there as set by an operator, and hold nobody."""
    night = {"scope": "team", "subject": "night", "unit": "calls", "limit": "9"}
    bench = bench.with_policy(limits=[*COUNTED, night])
    with pytest.raises(InvalidRequest, match=f"no call draws on .* under '{place}'") as caught:
        await bench.control_plane.set_budget(bench.tenant, key(bench), Decimal(1), by=OPERATOR)
    assert caught.value.field == "unit"
    of_night = BudgetKey.of(BudgetScope.TEAM, "night", "calls")
    assert (await bench.control_plane.set_budget(bench.tenant, of_night, Decimal(1), by=OPERATOR)).limit == 1


async def test_a_limit_of_another_tenant_is_refused(bench: Any) -> None:
    other = BudgetKey.of(BudgetScope.TENANT, str(uuid.uuid4()), "calls")
    with pytest.raises(InvalidRequest, match=str(bench.tenant)) as caught:
        await bench.control_plane.set_budget(bench.tenant, other, Decimal(1), by=OPERATOR)
    assert caught.value.field == "subject"


@pytest.mark.parametrize("amount", ["1e12", "1e999999999", "-1", "0.000000001", "NaN"])
async def test_a_limit_that_the_books_cannot_hold_is_refused_with_what_it_was(bench: Any, amount: str) -> None:
    limit = Decimal(amount)
    with pytest.raises(InvalidRequest, match=f"below 10.12.*not {re.escape(str(limit))}$") as caught:
        await bench.control_plane.set_budget(bench.tenant, calls_of(bench), limit, by=OPERATOR)
    assert caught.value.field == "limit"
    rich = replace(bench.requester, scopes=bench.requester.scopes | {"plm.cost.override"})
    with pytest.raises(InvalidRequest, match=f"not {re.escape(str(limit))}$") as caught:
        await bench.run(principal=rich, budget={"EUR": limit})
    assert caught.value.field == "budget.EUR"


async def test_a_limit_is_told_in_the_one_notation(bench: Any) -> None:
    for written in ("-0", "1E+2", "7.000000000000000000"):
        await bench.control_plane.set_budget(bench.tenant, calls_of(bench), Decimal(written), by=OPERATOR)
    assert [data["limit"] for _, data in await told(bench)] == ["0", "100", "7"]


@pytest.mark.parametrize("missing", ["reason", "command_id"])
async def test_a_correction_says_why_and_which(bench: Any, missing: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await correct(bench, calls_of(bench), "1", **{missing: " "})
    assert caught.value.field == missing


async def test_nobody_changes_a_budget_without_the_scope(bench: Any) -> None:
    with pytest.raises(Forbidden):
        await correct(bench, calls_of(bench), "1", by=bench.requester)
    with pytest.raises(Forbidden):
        await bench.control_plane.set_budget(bench.tenant, DAILY, Decimal(1), by=bench.requester)


async def test_a_budget_that_is_not_there_is_not_corrected(bench: Any) -> None:
    with pytest.raises(NotFound):
        await correct(bench, DAILY, "1")


NAMES = ("a", "B", "é", "z", "Z", "\U0001f600", "\uffff", "a b")  # sorted by their code points


async def test_every_budget_is_listed_once_in_pages_of_any_size(bench: Any) -> None:
    bench = bench.with_policy(limits=COUNTED)
    keys = [BudgetKey.of(BudgetScope.AGENT, name, unit) for name in NAMES for unit in ("calls", "EUR")]
    keys += [BudgetKey.of(BudgetScope.AGENT, "a", "calls", period) for period in (Period.DAY, Period.MONTH)]
    keys += [BudgetKey.of(BudgetScope.TENANT, str(bench.tenant), "calls")]
    keys += [BudgetKey.of(BudgetScope.USER, str(uuid.UUID(int=number << 96)), "calls") for number in (3, 1, 2)]
    for key in keys:
        await bench.control_plane.set_budget(bench.tenant, key, Decimal(1), by=OPERATOR)
    for limit in (1, 4, len(keys)):
        found, after = [], None
        while page := await bench.storage.budgets.list(bench.tenant, limit=limit, after=after):
            found += [each.key for each in page]
            after = BudgetKey.decode(found[-1].encode())
        assert found == sorted(keys, key=lambda key: key.place), limit
    (rest,) = await bench.storage.budgets.list(bench.tenant, limit=9, scope=BudgetScope.USER, after=found[-3])
    assert rest.key == found[-2]


async def test_a_budget_that_went_meanwhile_is_still_a_place_to_go_on_from(bench: Any) -> None:
    bench = bench.with_policy(limits=COUNTED)
    gone = BudgetKey.of(BudgetScope.AGENT, "m", "calls")
    for name in ("a", "z"):
        key = BudgetKey.of(BudgetScope.AGENT, name, "calls")
        await bench.control_plane.set_budget(bench.tenant, key, Decimal(1), by=OPERATOR)
    assert [each.subject for each in await bench.storage.budgets.list(bench.tenant, limit=9, after=gone)] == ["z"]


def written(content: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode()


ITS_OWN = ["agent", str(uuid.UUID(int=1)), "calls", "total", "a"]


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "é",
        "x",
        written(None),
        written({}),
        written(ITS_OWN[:4]),
        written([*ITS_OWN, 1]),
        *(
            written([*ITS_OWN[:place], junk, *ITS_OWN[place + 1 :]])
            for place in range(5)
            for junk in (0, [], {}, 1.5, True, "\ud800", "\0")
        ),
        base64.urlsafe_b64encode(b"[" * 100_000).decode(),
    ],
    ids=range(42 + 1),
)
def test_a_cursor_that_no_list_gave_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidRequest, match="not a cursor of the budgets"):
        BudgetKey.decode(cursor)


@pytest.fixture
def command(bench: Any, tmp_path: Path) -> Any:
    """`plm-cli` as an operator; each command has a thread, for its own event loop."""
    secret = secrets.token_hex(32)
    (tmp_path / "policy.json").write_text(bench.control_plane.policy.content)

    async def run(*arguments: str, scopes: tuple[str, ...] = ("plm.budgets",)) -> Any:
        now = int(time.time())
        claims = {"sub": str(uuid.uuid4()), "tenant_id": str(bench.tenant), "actor_kind": "human"}
        claims |= {"scopes": list(scopes), "iat": now, "exp": now + 600}
        token = Hs256JwtIdentityProvider(active_secret=secret).issue_token(claims)
        settings = {"PG_DSN": bench.database.app, "PLM_IDENTITY_HS256_SECRET_ACTIVE": secret, "PLM_TOKEN": token}
        settings["PLM_POLICY"] = str(tmp_path / "policy.json")
        return await asyncio.to_thread(CliRunner().invoke, build_app(), ["budget", *arguments], env=settings)

    return run


@pytest.mark.postgres_only
async def test_an_operator_is_told_the_window_that_a_limit_was_set_for(
    bench: Any, command: Any, tmp_path: Path
) -> None:
    limits = [{"scope": "agent", "per": "week", "unit": "calls", "limit": 5}]
    zoned = bench.with_policy(limits=limits, time_zone="Asia/Kolkata").control_plane.policy
    (tmp_path / "policy.json").write_text(zoned.content)
    said = await command("set", "agent", "ann", "calls", "7", "--per", "week", "--json")
    window = json.loads(said.stdout)
    starts, ends = (datetime.fromisoformat(window[name]) for name in ("starts_at", "ends_at"))
    assert (starts.astimezone(ZoneInfo("Asia/Kolkata")).isoweekday(), ends - starts) == (1, timedelta(days=7))
    assert (starts.time(), window["time_zone"]) == (time_of_day(18, 30), "Asia/Kolkata")
    shown = (await command("show", "--scope", "agent")).stdout
    assert f"of 7 calls this week until {ends:%Y-%m-%d} 18:30:00 UTC (Asia/Kolkata), set by an operator" in shown


@pytest.mark.postgres_only
async def test_an_operator_sees_sets_and_corrects_budgets_at_the_terminal(bench: Any, command: Any) -> None:
    lease = await bench.lease()
    await bench.settle(await bench.begun(lease), lease)
    tenant = str(bench.tenant)
    assert (await command("set", "tenant", tenant, "calls", "7")).exit_code == 0
    said = await command("correct", "tenant", tenant, "calls", "-1", "--reason", "a test", "--id", "x", "--json")
    assert json.loads(said.stdout)["spent"].startswith("0")
    said = await command("show", "--scope", "tenant")
    assert f"tenant {tenant}: 0 spent and 0 reserved of 7 calls, set by an operator" in said.stdout
    page = json.loads((await command("show", "--limit", "1", "--json")).stdout)
    rest = json.loads((await command("show", "--after", page["next"], "--json")).stdout)
    everything = json.loads((await command("show", "--json")).stdout)
    assert (page["items"] + rest["items"], rest["next"]) == (everything["items"], None)
    assert f"--after {page['next']}" in (await command("show", "--limit", "1")).stderr
    assert (await command("show", "--after", "nonsense")).exit_code == 2
    refused = await command("set", "tenant", tenant, "calls", "9", scopes=())
    assert (refused.exit_code, "plm.budgets" in refused.stderr) == (1, True)
    assert (await command("set", "user", "ann", "calls", "9")).exit_code == 2
    assert (await command("set", "agent", "ann", "calls", "many")).exit_code == 2
    nobody = await command("set", "tenant", tenant, "EURO", "9")
    assert (nobody.exit_code, "no call draws on this tenant budget in EURO" in nobody.stderr) == (1, True)
