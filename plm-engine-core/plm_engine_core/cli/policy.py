"""``plm-cli policy``: look at a policy before it is in force, try it as shadow, put it in force."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from plm_engine_core.cli.exits import ExitCode
from plm_engine_core.cli.output import AsJson, show
from plm_engine_core.cli.policy_acts import activate, active, shadow_app
from plm_engine_core.cli.storage import Books, refused, with_books
from plm_engine_core.control_plane.admission.admit import decided
from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry, Examined, ParallelPolicyEvaluator
from plm_engine_core.control_plane.amounts import plain
from plm_engine_core.control_plane.document_places import entries_in
from plm_engine_core.control_plane.documents import differences, load_document
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import Decision, EvaluatorSpec, PolicySnapshot, load_policy
from plm_engine_core.control_plane.policy.gates import decision_of, first_refusal
from plm_engine_core.control_plane.policy.lint import Severity, lint
from plm_engine_core.control_plane.policy.replay import Replay
from plm_engine_core.control_plane.policy.trials import CaseFile, Trial
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, load_capabilities
from plm_engine_core.control_plane.vocabulary import EvaluationPhase

app = typer.Typer(help="Look at a policy, try it, put it in force.", no_args_is_help=True)
app.command("activate")(activate)
app.command("active")(active)
app.add_typer(shadow_app, name="shadow")

PolicyFile = Annotated[Path, typer.Argument(help="The policy, YAML or JSON.", show_default=False)]
CapabilityFile = Annotated[Path, typer.Option("--capabilities", help="The capability file.", envvar="PLM_CAPABILITIES")]


@contextmanager
def _refusals(*, as_json: bool) -> Iterator[None]:
    """A file that cannot be right ends the command with one sentence."""
    try:
        yield
    except InvalidRequest as error:
        refused(error, as_json=as_json)


class Bench:
    """A policy with the capabilities and evaluators to ask it about a trial."""

    def __init__(self, file: Path, registry: CapabilityRegistry) -> None:
        self.policy: PolicySnapshot = load_policy(file)
        self.registry = registry
        self._evaluators: ParallelPolicyEvaluator = EvaluatorRegistry.installed().build(self.policy, file=file)

    def decide(self, trial: Trial) -> Decision:
        """What the policy decides; its evaluators are asked unless the trial says what they answer."""
        capability = self.registry.get(trial.capability)
        if trial.phase is EvaluationPhase.INPUT or (trial.phase is EvaluationPhase.OUTPUT and capability is not None):
            return self._examined(trial, capability)
        facts = trial.facts(capability)  # of one that is not registered, this says so in any phase
        decision, _ = asyncio.run(decided(trial, self.policy, facts, self._evaluators))
        return decision

    def _examined(self, trial: Trial, capability: CapabilityDescriptor | None) -> Decision:
        gates = self.policy.plans.gates_of(trial.phase, trial.capability)
        answers = trial.answers()
        if answers is None:
            shown = Examined(phase=trial.phase, document=trial.examined(capability))
            answers = asyncio.run(self._evaluators.examine_all(gates, shown))
        return decision_of(first_refusal(gates, answers, trial.phase))


def _require_asked(source: str, trial: Trial, *benches: Bench) -> None:
    """Refuse an answer of an evaluator that no policy declares: the one that was meant would count as not asked.

    Raises:
        InvalidRequest: naming `source` and the evaluator.
    """
    declared = sorted({spec.name for bench in benches for spec in bench.policy.evaluators})
    unknown = sorted((trial.evaluations or {}).keys() - set(declared))
    if unknown:
        there = f"there are {', '.join(declared)}" if declared else "it declares none"
        raise InvalidRequest(
            f"{source}: evaluations.{unknown[0]}: the policy declares no such evaluator; {there}", field="evaluations"
        )


@app.command("lint")
def lint_command(
    policy: PolicyFile,
    capabilities: CapabilityFile,
    strict: Annotated[bool, typer.Option("--strict", help="Count warnings as errors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is legal in a policy and probably not meant.

    Each remark has the file, line and column of its entry, or of what is around it, and the entry's name.

    Status 0: nothing, or only warnings; 1: errors, or the policy cannot be read; 2: wrong arguments.
    """
    with _refusals(as_json=as_json):
        bench = Bench(policy, load_capabilities(capabilities))
    of_policy, of_capabilities = entries_in(policy), entries_in(capabilities)
    remarks = [
        (each, (of_capabilities if each.at.startswith("capabilities.") else of_policy)(each.at))
        for each in lint(bench.policy, bench.registry)
    ]
    bad = [each for each, _ in remarks if strict or each.severity is Severity.ERROR]
    answer = {"digest": bench.policy.digest, "remarks": [{**vars(each), "place": place} for each, place in remarks]}
    lines = [f"{each.severity.value}: {place}: {each.at}: {each.message} [{each.check}]" for each, place in remarks]
    show(answer, "\n".join(lines) or "nothing to remark", as_json=as_json)
    if bad:
        raise typer.Exit(int(ExitCode.FAILED))


@app.command("explain")
def explain(
    policy: PolicyFile,
    proposal: Annotated[Path, typer.Argument(help="A proposal, YAML or JSON.", show_default=False)],
    capabilities: CapabilityFile,
    as_json: AsJson = False,
) -> None:
    """Decide one written proposal, and say which rule and which conditions decided it.

    With phase: input or output, say what the evaluators of that phase let a run be given, or a call give back.

    Status 0: it was decided, whatever the verdict; 1: a file cannot be read; 2: wrong arguments.
    """
    with _refusals(as_json=as_json):
        bench = Bench(policy, load_capabilities(capabilities))
        trial = load_document(proposal, Trial, "proposal")
        _require_asked(str(proposal), trial, bench)
        decision = bench.decide(trial)
    show({"digest": bench.policy.digest, **decision.to_json()}, _explained(decision), as_json=as_json)


def _explained(decision: Decision) -> str:
    lines = [f"{decision.outcome.value}: {decision.message}" if decision.message else decision.outcome.value]
    named = {"reason": decision.reason, "rule": decision.rule, "tier": decision.tier, "risk": decision.risk}
    lines += [f"  {name}: {value}" for name, value in named.items() if value]
    lines += [f"  risk raised by {place}" for place in decision.raised_by]
    for stage in decision.stages:
        detail = f": {stage.detail}" if stage.detail else ""
        lines.append(f"  {'passed ' if stage.passed else 'refused'} {stage.stage.value}{detail}")
    words = {True: "holds", False: "does not hold", None: "cannot be decided"}
    lines += [f"  {leaf.at}: {leaf.says}: {words[leaf.holds]}" for leaf in decision.leaves]
    return "\n".join(lines + ([f"  unblocked by {decision.unblock}"] if decision.unblock else []))


@app.command("test")
def compare(
    policy: PolicyFile,
    cases: Annotated[Path, typer.Argument(help="A file of cases, YAML or JSON.", show_default=False)],
    capabilities: CapabilityFile,
    as_json: AsJson = False,
) -> None:
    """Decide every case of a file and compare with what it expects.

    Status 0: all as expected; 1: not, or a file cannot be read; 2: wrong arguments.
    """
    with _refusals(as_json=as_json):
        bench = Bench(policy, load_capabilities(capabilities))
        read = load_document(cases, CaseFile, "case file").cases
        for case in read:
            _require_asked(f"{cases}: case {case.name!r}", case.given, bench)
        found = {case.name: case.expect.mismatches(bench.decide(case.given)) for case in read}
    wrong = {name: mismatches for name, mismatches in found.items() if mismatches}
    lines = [
        f"{name}: {member} is {_word(got)}, expected {_word(expected)}"
        for name, mismatches in wrong.items()
        for member, (expected, got) in mismatches.items()
    ]
    lines.append(f"{len(found) - len(wrong)} of {len(found)} cases as expected")
    answer = {
        "digest": bench.policy.digest,
        "cases": len(found),
        "failed": [
            {"case": name, "member": member, "expected": _word(expected), "decided": _word(got)}
            for name, mismatches in wrong.items()
            for member, (expected, got) in mismatches.items()
        ],
    }
    show(answer, "\n".join(lines), as_json=as_json)
    if wrong:
        raise typer.Exit(int(ExitCode.FAILED))


def _word(value: Any) -> str:
    return "nothing" if value is None else str(value)


@app.command("diff")
def diff(
    old: PolicyFile,
    new: Annotated[Path, typer.Argument(help="The policy to compare it with.", show_default=False)],
    capabilities: CapabilityFile,
    cases: Annotated[Path | None, typer.Option(help="A file of cases to compare as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which capabilities, proposed without arguments, and which cases two policies decide differently.

    And every entry that is not the same in both, as no decision shows a quorum, a budget, a rate or what depends on
    arguments. Their version alone is no difference.

    Status 0: no difference; 1: some, or a file cannot be read; 2: wrong arguments.
    """
    with _refusals(as_json=as_json):
        registry = load_capabilities(capabilities)
        before, after = Bench(old, registry), Bench(new, registry)
        trials = {f"capability {each.id}": Trial(capability=each.id) for each in registry}
        if cases is not None:
            read = load_document(cases, CaseFile, "case file").cases
            for case in read:
                _require_asked(f"{cases}: case {case.name!r}", case.given, before, after)
            trials |= {f"case {case.name}": case.given for case in read}
        pairs = {name: (before.decide(trial), after.decide(trial)) for name, trial in trials.items()}
    changed = {name: pair for name, pair in pairs.items() if _treated(pair[0]) != _treated(pair[1])}
    asked = _asked_otherwise(before.policy, after.policy)
    old_entries, new_entries = (each.policy.model_dump(mode="json", exclude={"version"}) for each in (before, after))
    entries = tuple(differences(old_entries, new_entries))
    answer = {
        "old": before.policy.digest,
        "new": after.policy.digest,
        "changed": [
            *({"what": name, "old": _brief(one), "new": _brief(two)} for name, (one, two) in changed.items()),
            *({"what": f"evaluator {name}", "old": one, "new": two} for name, (one, two) in asked.items()),
        ],
        "entries": [{"at": at, "old": one, "new": two} for at, one, two in entries],
    }
    lines = [f"{name}: {_line(one)} -> {_line(two)}" for name, (one, two) in changed.items()]
    lines += [f"evaluator {name}: {_asked(one)} -> {_asked(two)}" for name, (one, two) in asked.items()]
    lines += [f"  {at}: {_entry(one)} -> {_entry(two)}" for at, one, two in entries]
    show(answer, "\n".join(lines) or "no difference", as_json=as_json)
    if changed or asked or entries:
        raise typer.Exit(int(ExitCode.FAILED))


def _asked_otherwise(old: PolicySnapshot, new: PolicySnapshot) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The evaluators of the phases in which no capability is proposed, by name, where they are not the same in both."""
    one, two = (
        {spec.name: spec for spec in policy.evaluators if spec.phase is not EvaluationPhase.CALL}
        for policy in (old, new)
    )
    return {
        name: (_spec_brief(one.get(name)), _spec_brief(two.get(name)))
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    }


def _spec_brief(spec: EvaluatorSpec | None) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude={"name", "gate"}) if spec is not None else {}


def _asked(brief: dict[str, Any]) -> str:
    if not brief:
        return "not there"
    config = json.dumps(brief["config"], ensure_ascii=False, sort_keys=True)
    return f"{brief['phase']} of {', '.join(brief['capabilities'])} ({brief['kind']} {config:.200})"


def _entry(value: Any) -> str:
    return "nothing" if value is None else f"{json.dumps(value, ensure_ascii=False):.200}"


def _treated(decision: Decision) -> tuple[Any, ...]:
    return decision.outcome, decision.reason, decision.risk, decision.guidance


def _brief(decision: Decision) -> dict[str, Any]:
    return {key: value for key, value in decision.to_json().items() if key in ("outcome", "reason", "risk", "rule")}


def _line(decision: Decision) -> str:
    return f"{decision.outcome.value} ({decision.rule or decision.reason})"


@app.command("replay")
def replay(
    policy: PolicyFile,
    tenant_id: Annotated[UUID, typer.Option(help="Whose recorded proposals.")],
    days: Annotated[float, typer.Option(min=0.0, max=36_500.0, help="Of the last how many days.")] = 7.0,
    as_json: AsJson = False,
) -> None:
    """Decide the recorded proposals again under this policy, each on the facts it was recorded with.

    Evaluators of the phases input and output are not asked, as proposals say nothing to them; the report names them.

    Nothing is written. Budgets, halts and rates are as they were. Status 0: done; 1: the policy cannot be read, there
    is no such tenant, or the database refused; 2: wrong arguments; 3: no address.
    """
    with _refusals(as_json=as_json):
        report = Replay(policy=load_policy(policy))
    since = datetime.now(UTC) - timedelta(days=days)
    with_books(lambda books: _replay(books, report, tenant_id, since), of=tenant_id, as_json=as_json)
    show({"tenant_id": tenant_id, **report.to_json()}, _reported(report), as_json=as_json)


async def _replay(books: Books, report: Replay, tenant_id: UUID, since: datetime) -> None:
    async for batch in books.storage.runs.attempts(tenant_id, since=since):
        report.feed(batch)


def _reported(report: Replay) -> str:
    others = f", {report.on_other_terms} asked for on other terms" if report.on_other_terms else ""
    lines = [f"{report.attempts} recorded proposals, {report.changed} decided otherwise{others}"]
    lines += [
        f"  {count} x {capability}: {before} -> {after}"
        for (capability, before, after), count in sorted(report.by_capability.items())
    ]
    lines += [
        f"  {count} x {after} instead of {before or 'nothing said'}"
        for (before, after), count in sorted(report.terms.items())
    ]
    if report.not_asked:
        lines.append(f"not asked, as they are not about proposals: {', '.join(report.not_asked)}")
    lines.append("allowed, asked and undecided calls would reserve")
    lines += [
        f"  {plain(each.after)} {unit} instead of {plain(each.before)}" for unit, each in report.costs.reserved.items()
    ]
    lines.append("settled calls spent, of which would have been spent; at most, with calls that were never made")
    lines += [
        f"  {plain(each.before)} {unit}, {plain(each.after)}; at most {plain(each.at_most)}"
        for unit, each in report.costs.spent.items()
    ]
    lines += [
        f"  run {each.attempt.run_id} step {each.attempt.step_index} ({each.before} -> {each.after}): "
        f"{each.rule}: {each.message or 'allowed'}"
        for each in report.examples
    ]
    return "\n".join(lines)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of policy files, for editors. Status 0."""
    typer.echo(policy_schema())


def policy_schema() -> str:
    """The JSON Schema of policy files as it is published."""
    document = PolicySnapshot.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **document}, indent=2)
