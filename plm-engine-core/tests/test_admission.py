"""Admission, begin and settlement on a real database."""

from __future__ import annotations

from decimal import Decimal

from plm_engine_core.control_plane import Granted, Outcome
from plm_engine_core.control_plane.vocabulary import BudgetUnit, OutcomeStatus, StepState

OK = Outcome(status=OutcomeStatus.SUCCEEDED, output={"answer": 42}, usage={"thing": Decimal(3)})


async def test_a_granted_call_reserves_and_settlement_charges_what_was_measured(bench):
    lease = await bench.lease()
    admission = await bench.control_plane.admit(bench.proposal(lease))
    assert isinstance(admission, Granted)
    assert await bench.budget(lease.run, "run", BudgetUnit.EUR) == (0, Decimal("0.50"))
    assert await bench.budget(lease.run, "tenant", BudgetUnit.CALLS) == (0, 1)
    begun = await bench.control_plane.begin(admission.grant, fencing_token=lease.fencing_token, actor="test")
    assert begun.accepted
    settlement = await bench.control_plane.settle(
        admission.grant,
        OK,
        capability_id="thing.read",
        fencing_token=lease.fencing_token,
        trace_id=lease.run.trace_id,
        actor="test",
    )
    assert settlement.spent == {"EUR": "0.03", "calls": "1"}
    assert await bench.budget(lease.run, "run", BudgetUnit.EUR) == (Decimal("0.03"), 0)
    assert await bench.budget(lease.run, "tenant", BudgetUnit.EUR) == (Decimal("0.03"), 0)
    (step,) = await bench.control_plane.storage.runs.steps(bench.tenant, lease.run.id)
    assert step.state is StepState.SUCCEEDED
    assert step.output == {"answer": 42}
    assert [each.consistent for each in await bench.control_plane.verify_events(bench.tenant)] == [True]
    mcrc = await bench.control_plane.storage.runs.mcrc(bench.tenant, lease.run.id)
    assert (mcrc["connector_call_count"], mcrc["connector_cost_eur"], mcrc["telemetry_event_count"]) == (
        1,
        Decimal("0.03"),
        1,
    )
