"""Policy and capability files: what is wrong is named with its file and entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.documents import parse_document
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import PolicySnapshot, load_policy, read_policy
from plm_engine_core.control_plane.policy.lint import require_known_names
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, load_capabilities

POLICY = """
version: "1"
tier_by_mode: {read: auto_approve, plan-write: auto_approve, execute-write: always_approve}
risk_by_mode: {read: low, plan-write: low, execute-write: high}
budgets: {run: {EUR: 1, calls: 1}, tenant: {EUR: 1, calls: 1}}
"""
CAPABILITIES = """
capabilities:
  - {id: thing.read, description: look, mode: read, plugin: things}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_complete_files_are_read(tmp_path):
    assert load_policy(write(tmp_path, POLICY)).version == "1"
    assert [each.id for each in load_capabilities(write(tmp_path, CAPABILITIES))] == ["thing.read"]


@pytest.mark.parametrize(
    ("old", "new", "field", "message"),
    [
        ("version: '1'", "", "policy", "must be a mapping of entries"),
        ("EUR: 1, calls: 1}, tenant", "EUR: x, calls: 1}, tenant", "budgets.run.EUR", r"\(given: 'x'\)"),
        ("execute-write: high", "execute-write: huge", "risk_by_mode.execute-write", "'low', 'medium' or 'high'"),
        ("budgets:", "budget:", "budgets", "Field required"),
        ("risk_by_mode:", "tier_by_mode: {read: unrestricted}\nrisk_by_mode:", "policy", "'tier_by_mode' twice"),
        ("risk_by_mode:", "extra: 1\nrisk_by_mode:", "extra", "Extra inputs"),
        ("budgets:", "budgets: [", "policy", "not YAML"),
    ],
)
def test_a_bad_policy_is_refused_with_the_place_of_its_error(tmp_path, old, new, field, message):
    text = "" if field == "policy" and new == "" else POLICY.replace(old, new)
    assert text != POLICY
    path = write(tmp_path, text)
    with pytest.raises(InvalidRequest, match=message) as caught:
        load_policy(path)
    assert caught.value.field == field
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "field", "message"),
    [
        ("mode: read", "mode: reed", "capabilities.0.mode", "given: 'reed'"),
        ("id: thing.read", "id: Thing", "capabilities.0.id", "pattern"),
        ("plugin: things", "plugins: things", "capabilities.0.plugin", "Field required"),
        ("mode: read", "mode: read, mode: execute-write", "capability file", "'mode' twice"),
        ("capabilities:", "things:", "capabilities", "Field required"),
        ("mode: read", "mode: read, cost: {max_eur: -1}", "capabilities.0.cost.max_eur", "greater than or equal to 0"),
    ],
)
def test_a_bad_capability_file_is_refused_with_the_place_of_its_error(tmp_path, old, new, field, message):
    path = write(tmp_path, CAPABILITIES.replace(old, new))
    with pytest.raises(InvalidRequest, match=message) as caught:
        load_capabilities(path)
    assert caught.value.field == field
    assert str(path) in str(caught.value)


def test_an_oauth_scope_that_no_token_can_carry_is_refused(tmp_path):
    for scope in ("two words", "", 'a"quote', "über", "x" * 129):
        written = CAPABILITIES.replace("plugin: things", f"plugin: things, required_scopes: [{scope!r}]")
        with pytest.raises(InvalidRequest, match=r"required_scopes.*an OAuth scope is"):
            load_capabilities(write(tmp_path, written))


def test_a_policy_that_asks_for_such_a_scope_is_refused_before_it_is_activated_and_still_read(tmp_path):
    for approval, place in (
        ("{required_scope: two words}", "approval.required_scope"),
        ("{by_tier: {always_approve: {required_scope: two words}}}", "approval.by_tier.always_approve.required_scope"),
        ("{by_risk: {high: {required_scope: two words}}}", "approval.by_risk.high.required_scope"),
        ("{escalation: {required_scope: two words}}", "approval.escalation.required_scope"),
        ("{input: {required_scope: two words}}", "approval.input.required_scope"),
    ):
        policy = load_policy(write(tmp_path, POLICY + f"\napproval: {approval}\n"))
        assert read_policy(policy.content, source="the active policy") == policy
        with pytest.raises(InvalidRequest, match="no token carries another") as refused:
            require_known_names(policy, load_capabilities(write(tmp_path, CAPABILITIES)), source="policy")
        assert refused.value.field == place


def test_a_policy_that_stands_in_no_file_is_refused_by_its_entry_and_names_no_place(tmp_path):
    content = load_policy(write(tmp_path, POLICY)).content
    for changes, message in (
        ({"tiers": 5}, "policy: tiers: must be a mapping of entries (given: 5)"),
        ({"tiers": {"a.b": "steer"}}, "policy: tiers.a.b: guidance is missing for the steered capabilities a.b"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            read_policy(json.dumps({**json.loads(content), **changes}), source="policy")
        assert str(refused.value) == f"{message}; correct it there"


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"gone\.yaml cannot be read: No such file"):
        load_policy(tmp_path / "gone.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match=r"binary\.yaml is not YAML"):
        load_capabilities(binary)


RULE = """
rules:
  - id: big
    capabilities: [thing.read]
    when:
      type: and
      conditions:
        - {type: action, actions: ["*"]}
        - {type: field, path: arguments.amount, operator: above, value: 3}
    then: ask
"""


UNDECLARED = "rules:\n  - id: a\n    when: {type: evaluator, evaluator_name: ghost}\n    then: deny\n"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (POLICY + RULE, ":14:49: rules.0.when.and.conditions.1.field.operator"),
        (POLICY.replace("execute-write: high", "execute-write: huge"), ":4:44: risk_by_mode.execute-write"),
        (POLICY.replace("version:", "extra: 1\nversion:"), ":2:1: extra"),
        (POLICY.replace("EUR: 1, calls: 1}, tenant", "calls: 1}, tenant"), ":5:11: budgets.run"),
        (POLICY + "tiers: {blocked: [a.b], unrestricted: [a.b]}\n", ":6:1: tiers: a.b is both"),
        (POLICY + "tiers: {blocked: [a.c], steer: [a.b]}\n", ":6:1: tiers.a.b: guidance is missing"),
        (POLICY + "tiers: {a.c: blocked, a.b: steer}\n", ":6:23: tiers.a.b: guidance is missing"),
        (POLICY.replace("plan-write: auto_approve", "plan-write: steer"), ":3:36: tier_by_mode.plan-write: "),
        (POLICY.replace("read: low, ", ""), ":4:1: risk_by_mode: risk_by_mode has no entry for read"),
        (POLICY + "rules:\n- {id: a, then: deny}\n- {id: a, then: ask}\n", ":8:3: rules.1: rules has a twice"),
        (POLICY + "evaluators:\n- {name: a, kind: k}\n- {name: a, kind: k}\n", ":8:3: evaluators.1: "),
        (POLICY + "units: [rows, EUR]\n", ":6:15: units.1: units has EUR twice"),
        (POLICY + "limits:\n- {scope: user, per: day, unit: mails, limit: 1}\n", ":7:27: limits.0.unit: "),
        (POLICY.replace("calls: 1}, tenant", "calls: 1, mails: 1}, tenant"), ":5:35: budgets.run.mails: "),
        (POLICY + UNDECLARED, ":8:5: rules.0.when: rules.a.when asks the evaluator ghost"),
    ],
)
def test_an_error_is_named_with_its_line_and_column(tmp_path, text, place):
    path = write(tmp_path, text)
    with pytest.raises(InvalidRequest) as caught:
        load_policy(path)
    assert f"{path}{place}" in str(caught.value)


def test_json_is_read_as_strictly_as_yaml(tmp_path):
    document = yaml.safe_load(POLICY)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")
    assert load_policy(path).digest == load_policy(write(tmp_path, POLICY)).digest
    for text, problem in (
        (
            json.dumps({**document, "grant_seconds": -1}, indent=1),
            r"policy\.json:23:2: grant_seconds: .* greater than 0",
        ),
        (
            json.dumps({**document, "grant_seconds": -1}, indent="\t"),
            r"policy\.json:23:2: grant_seconds: .* greater than 0",
        ),
        ('{"version": "1", "version": "2"}', "'version' twice"),
        ('{"max_eur_per_call": NaN}', "NaN is no JSON number"),
        ('{"max_eur_per_call": 1e400}', "1e400 is too large a number"),
        (f'{{"max_eur_per_call": {"9" * 5000}}}', "found a number of 5000 digits"),
        (r'{"version": "\ud800"}', "half a surrogate pair"),
        ('{"version": ', "is not JSON: line 1, column 13"),
        ("version: 1", "is not JSON: line 1, column 1"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InvalidRequest, match=problem):
            load_policy(path)


NINE_TIMES_TEN = "  - &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  - &a{each} [{', '.join([f'*a{each - 1}'] * 10)}]\n" for each in range(1, 9)
)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("rules: no", r":6:8: 'no' is a truth value to some; write true or false, or put it in quotes"),
        ("grant_seconds: 1:30", ":6:16: '1:30' is not a number to everybody"),
        ("grant_seconds: 010", ":6:16: '010' is not a number to everybody"),
        ("grant_seconds: 1_000", ":6:16: '1_000' is not a number to everybody"),
        (f"grant_seconds: {'9' * 5000}", ":6:16: found a number of 5000 digits"),
        ("grant_seconds: .inf", ":6:16: '.inf' is no number that can be kept"),
        ("grant_seconds: .NaN", ":6:16: '.NaN' is no number that can be kept"),
        ("grant_seconds: !!int ''", ":6:16: '' is not a number to everybody"),
        ("grant_seconds: !!float x", ":6:16: 'x' is no number that can be kept"),
        ("rules: !!bool x", ":6:8: 'x' is a truth value to some"),
        ("rules: !!timestamp x", ":6:8: the tag !!timestamp is not read"),
        ("rules: !!set {a}", ":6:8: the tag !!set is not read"),
        ("rules: !mine {}", ":6:8: the tag !mine is not read"),
        ("guidance: {1: x}", ":6:12: found the key '1', which is no text; put it in quotes"),
        ("guidance: {on: x}", ":6:12: found the key 'on', which is no text"),
        ("guidance: {[a]: x}", ":6:12: found a key that is a list or a mapping"),
        ("guidance: {<<: {a: b}}", r":6:12: merge keys \(<<\) are not read; write the entries out"),
        ('guidance: {a: "\\ud800"}', ":6:15: found NUL or half a surrogate pair"),
        (r'guidance: {a: "\0"}', ":6:15: found NUL or half a surrogate pair"),
        ("rules: &all [*all]", ":6:8: this refers to itself"),
        (f"rules:\n{NINE_TIMES_TEN}", r":12:5: this stands for more than 1000000 values"),
        ("tiers: {blocked: [[a]]}", r":6:1: tiers: blocked needs a list of capabilities, and \['a'\] is no name"),
        ("rules: {id: a}", ":6:1: rules: must be a list"),
        ("rules: [{id: 1, then: deny}]", r":6:10: rules.0.id: must be a text; write it in quotes \(given: 1\)"),
        ("auto_approve_when: {}", ":6:1: auto_approve_when: needs an entry 'type'"),
        ("auto_approve_when: {type: field, path: [], operator: exists}", "path: the path is empty"),
        ("auto_approve_when: {type: field, path: agent, operator: eq, value: {}}", "value: must be a text, a number"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks_is_refused_with_its_place(tmp_path, line, problem):
    with pytest.raises(InvalidRequest, match=problem):
        load_policy(write(tmp_path, f"{POLICY}{line}\n"))


def test_yaml_gives_what_json_would(tmp_path):
    text = """{auto_approve_when: {type: or, conditions: [
      &date {type: field, path: arguments.day, operator: eq, value: 2024-01-01},
      {type: field, path: arguments.sign, operator: in, value: [=, ~, true, -1, 1.5e+3, .5]}, *date]}}"""
    tree = load_policy(write(tmp_path, POLICY + text[1:-1])).auto_approve_when
    assert [each.value for each in tree.conditions] == ["2024-01-01", ("=", None, True, -1, 1500.0, 0.5), "2024-01-01"]


@pytest.mark.parametrize("name", ["deep.yaml", "deep.json"])
def test_a_file_that_is_nested_without_end_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        load_policy(path)


def test_a_capability_registered_twice_is_refused():
    one = CapabilityDescriptor(id="a.b", description="x", mode="read", plugin="p")
    with pytest.raises(InvalidRequest, match=r"a\.b is registered twice"):
        CapabilityRegistry([one, one])


@given(st.text(max_size=300) | st.binary(max_size=300), st.sampled_from(["policy.yaml", "policy.json"]))
def test_whatever_a_file_holds_it_is_read_or_refused_with_its_name(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    with pytest.raises(InvalidRequest, match=name.replace(".", r"\.")):
        load_policy(path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMES = ["id", "then", "when", "type", "and", "conditions", "condition", "path", "value", "read", "EUR"]
PIECES = st.recursive(
    SCALARS | st.sampled_from(["deny", "low", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


def read(text):
    """The policy, or the message of its refusal."""
    try:
        return parse_document(text, PolicySnapshot, "policy", source="p.yaml")
    except InvalidRequest as error:
        return str(error)


@given(st.sampled_from(sorted(PolicySnapshot.model_fields)), PIECES)
def test_whatever_stands_in_an_entry_it_is_read_or_refused_with_its_place(member, piece):
    answer = read(yaml.safe_dump({**yaml.safe_load(POLICY), member: piece}))
    if isinstance(answer, str):
        assert answer.startswith("p.yaml:")
    else:
        assert PolicySnapshot.model_validate_json(answer.model_dump_json()).digest == answer.digest
