"""Conditions: what each leaf and composite answers, their bounds, and the compiled form against an obvious slow one."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.matching import LONGEST_TEXT, Match, matcher
from plm_engine_core.control_plane.policy.compiled import View, compile_condition
from plm_engine_core.control_plane.policy.conditions import (
    And,
    Condition,
    ConditionTree,
    EvaluatorSays,
    FieldIs,
    Not,
    Or,
    RiskLevelIs,
    TimeOfDay,
)
from plm_engine_core.control_plane.vocabulary import RiskLevel
from pydantic import TypeAdapter, ValidationError

TREE = TypeAdapter(ConditionTree)
NOON_MONDAY = datetime(2024, 1, 1, 12, 0, tzinfo=UTC)


def view(**changes) -> View:
    fields = {
        "arguments": {"amount": 50, "text": "Hello", "flag": True, "list": ["a", {"n": 1}], "money": "12.50", "a.b": 7},
        "resource": "Bucket/Prod/1",
        "capability": {"id": "thing.use", "mode": "read", "version": "1"},
        "claims": {"weight": 2, "score": 0.8},
        "principal": {"user_id": "u", "actor_kind": "human", "scopes": ["a", "b"]},
        "agent": "reviewer",
        "autonomy": "L2",
    }
    values = {"fields": {**fields, **changes.pop("fields", {})}, "risk": 1, "at": NOON_MONDAY}
    return View(**{**values, **changes})


def holds(document, seen=None):
    return compile_condition(TREE.validate_python(document), "when")(seen or view()).holds


def field(path, operator, *value):
    return {"type": "field", "path": path, "operator": operator, **({"value": value[0]} if value else {})}


@pytest.mark.parametrize(
    ("leaf", "answer"),
    [
        ({"type": "risk_level", "level": "medium"}, True),
        ({"type": "risk_level", "level": "low"}, False),
        ({"type": "risk_level", "level": "low", "operator": "gt"}, True),
        ({"type": "risk_level", "level": "high", "operator": "eq"}, False),
        ({"type": "weight", "max_weight": 2}, True),
        ({"type": "weight", "max_weight": 1.99}, False),
        ({"type": "score", "min_score": 0.8}, True),
        ({"type": "score", "min_score": 0.81}, False),
        ({"type": "action", "actions": ["other.use", "THING.*"]}, True),
        ({"type": "action", "actions": ["thing.use"], "mode": "deny"}, False),
        ({"type": "action", "actions": ["thing"], "mode": "deny"}, True),
        ({"type": "asset", "patterns": ["bucket/prod/*"], "match": "glob"}, True),
        ({"type": "asset", "patterns": ["prod"], "match": "glob"}, False),
        ({"type": "asset", "patterns": ["bucket/(prod|test)/[0-9]+"], "match": "regex"}, True),
        ({"type": "asset", "patterns": ["prod"], "match": "regex"}, False),
        ({"type": "evaluator", "evaluator_name": "clean"}, True),
        ({"type": "evaluator", "evaluator_name": "dirty"}, False),
        ({"type": "evaluator", "evaluator_name": "silent"}, None),
        (field("arguments.amount", "le", 50), True),
        (field("arguments.amount", "lt", 50), False),
        (field("arguments.money", "gt", 12.49), True),
        (field("arguments.money", "ge", 12.5), True),
        (field("arguments.text", "gt", 1), None),
        (field("arguments.flag", "gt", 0), None),
        (field("arguments.none", "gt", 0), None),
        (field("arguments.flag", "eq", 1), False),
        (field("arguments.flag", "eq", True), True),
        (field("arguments.none", "eq", None), False),
        (field("arguments.none", "ne", 1), True),
        (field("arguments.none", "exists"), False),
        (field("arguments.list", "exists"), True),
        (field("arguments.list", "contains", "a"), True),
        (field("arguments.text", "contains", "H"), None),
        (field("arguments.list.1.n", "eq", 1), True),
        (field("arguments.list.7", "exists"), False),
        (field("arguments.list.-1", "exists"), False),
        (field(["arguments", "a.b"], "eq", 7), True),
        (field("arguments.text", "glob", "hell?"), True),
        (field("arguments.text", "glob", "hell"), False),
        (field("arguments.amount", "glob", "*"), None),
        (field("arguments.text", "regex", "h[a-z]+"), True),
        (field("agent", "in", ["reviewer", "other"]), True),
        (field("agent", "not_in", ["reviewer"]), False),
        (field("autonomy", "eq", "L2"), True),
        (field("principal.scopes", "contains", "b"), True),
        (field("capability.mode", "eq", "read"), True),
        ({"type": "time_of_day", "start": "09:00", "end": "17:00"}, True),
        ({"type": "time_of_day", "start": "12:01", "end": "17:00"}, False),
        ({"type": "time_of_day", "start": "22:00", "end": "12:01"}, True),
        ({"type": "time_of_day", "weekdays": ["tue"]}, False),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else str(value),
)
def test_each_leaf_says_whether_it_holds(leaf, answer):
    assert holds(leaf, view(evaluations={"clean": True, "dirty": False})) is answer
    opposite = None if answer is None else not answer
    assert holds({"type": "not", "condition": leaf}, view(evaluations={"clean": True, "dirty": False})) is opposite


def test_the_time_is_a_fact_and_without_it_undecided():
    assert holds({"type": "time_of_day"}, view(at=None)) is None


YES, NO, OPEN = field("agent", "exists"), field("agent", "eq", "x"), field("arguments.none", "gt", 0)


@pytest.mark.parametrize(
    ("kind", "parts", "answer", "deciders"),
    [
        ("and", [YES, YES], True, [0, 1]),
        ("and", [YES, NO, OPEN], False, [1]),
        ("and", [OPEN, NO], False, [1]),
        ("and", [YES, OPEN, YES], None, [1]),
        ("or", [NO, NO], False, [0, 1]),
        ("or", [NO, YES, OPEN], True, [1]),
        ("or", [OPEN, YES], True, [1]),
        ("or", [NO, OPEN], None, [1]),
    ],
)
def test_a_composite_names_the_leaves_that_decided_it(kind, parts, answer, deciders):
    found = compile_condition(TREE.validate_python({"type": kind, "conditions": parts}), "when")(view())
    assert found.holds is answer
    assert [leaf.at for leaf in found.leaves] == [f"when.conditions.{index}" for index in deciders]


def test_a_leaf_is_told_with_its_place_and_its_words():
    tree = TREE.validate_python({"type": "not", "condition": field("arguments.amount", "le", 100)})
    (leaf,) = compile_condition(tree, "rules.big.when")(view()).leaves
    assert leaf.to_json() == {"at": "rules.big.when.condition", "says": "arguments.amount le 100", "holds": True}


def nested(depth):
    tree = YES
    for _ in range(depth - 1):
        tree = {"type": "not", "condition": tree}
    return tree


def wide(nodes):
    return {"type": "or", "conditions": [YES] * (nodes - 1)}


def test_a_tree_is_as_deep_and_as_large_as_the_bounds_and_no_more():
    assert holds(nested(16)) is not None
    assert holds(wide(1000)) is True
    for document, problem in ((nested(17), "more than 16 deep"), (wide(1001), "more than 1000 nodes")):
        with pytest.raises(ValidationError, match=problem):
            TREE.validate_python(document)


def test_ten_thousand_nots_are_refused_without_a_stack_to_overflow():
    with pytest.raises(ValidationError, match="more than 16 deep"):
        TREE.validate_python(nested(10_000))


def test_a_tree_of_nodes_is_bounded_when_it_is_compiled():
    tree: Condition = RiskLevelIs(level=RiskLevel.LOW)
    for _ in range(16):
        tree = Not(condition=tree)
    with pytest.raises(ValueError, match="more than 16 deep"):
        compile_condition(tree, "when")


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"type": "and", "conditions": []}, "at least 1 item"),
        ({"type": "or", "conditions": []}, "at least 1 item"),
        ({"type": "xor", "conditions": [YES]}, "'xor'"),
        ({**YES, "extra": 1}, "Extra inputs"),
        ({"type": "evaluator", "evaluator_name": "x", "config": {}}, "Extra inputs"),
        ({"type": "asset", "patterns": ["a"]}, "Field required"),
        ({"type": "asset", "patterns": ["("], "match": "regex"}, "no RE2 pattern"),
        ({"type": "asset", "patterns": [""], "match": "glob"}, "at least 1 character"),
        (field("arguments.a", "regex", r"(a)\1"), "no RE2 pattern"),
        (field("arguments.a", "le"), "needs a number"),
        (field("arguments.a", "le", "5"), "needs a number"),
        (field("arguments.a", "le", True), "needs a number"),
        (field("arguments.a", "le", float("nan")), "finite"),
        (field("arguments.a", "in", []), "needs a list"),
        (field("arguments.a", "in", "abc"), "needs a list"),
        (field("arguments.a", "eq"), "needs a value"),
        (field("arguments.a", "exists", 1), "takes no value"),
        (field("argument.a", "exists"), "starts with none of agent, arguments"),
        (field("resource.name", "exists"), "leads nowhere: resource is"),
        (field("capability.modus", "exists"), "leads nowhere: capability has certified"),
        (field("arguments..a", "exists"), "leads nowhere"),
        ({"type": "time_of_day", "start": "9:00"}, "pattern"),
        ({"type": "time_of_day", "start": "24:01"}, "pattern"),
    ],
)
def test_a_node_that_cannot_mean_anything_is_refused(document, problem):
    with pytest.raises(ValidationError, match=problem):
        TREE.validate_python(document)


# --- the compiled form against an obvious slow one -------------------------------------------------------------------

VALUES = st.sampled_from([0, 1, 2, -1, 0.5, True, False, None, "1", "0.5", "abc", "ABC", "b*"])
PATHS = st.sampled_from(["arguments.a", "arguments.b.c", "arguments.b.0", "resource", "agent", "claims.weight"])
FIELDS = st.one_of(
    st.builds(FieldIs, path=PATHS, operator=st.sampled_from(["eq", "ne", "contains"]), value=VALUES),
    st.builds(
        FieldIs, path=PATHS, operator=st.sampled_from(["le", "ge", "lt", "gt"]), value=st.sampled_from([0, 1, 0.5])
    ),
    st.builds(
        FieldIs,
        path=PATHS,
        operator=st.sampled_from(["in", "not_in"]),
        value=st.lists(VALUES, min_size=1, max_size=3).map(tuple),
    ),
    st.builds(FieldIs, path=PATHS, operator=st.just("glob"), value=st.sampled_from(["a*", "*C", "?bc", "abc", "*"])),
    st.builds(FieldIs, path=PATHS, operator=st.just("exists")),
)
LEAVES = st.one_of(
    FIELDS,
    st.builds(RiskLevelIs, level=st.sampled_from(RiskLevel), operator=st.sampled_from(["eq", "le", "ge", "lt", "gt"])),
    st.builds(EvaluatorSays, evaluator_name=st.sampled_from(["yes", "no", "silent"])),
    st.builds(
        TimeOfDay, start=st.sampled_from(["00:00", "12:00", "18:30"]), end=st.sampled_from(["06:00", "12:01", "24:00"])
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.builds(Not, condition=children),
        st.builds(And, conditions=st.lists(children, min_size=1, max_size=4).map(tuple)),
        st.builds(Or, conditions=st.lists(children, min_size=1, max_size=4).map(tuple)),
    ),
    max_leaves=12,
).filter(lambda tree: depth(tree) <= 16)
VIEWS = st.builds(
    lambda arguments, resource, agent, claims, risk, at: View(
        fields={"arguments": arguments, "resource": resource, "agent": agent, "claims": claims},
        risk=risk,
        at=at,
        evaluations={"yes": True, "no": False},
    ),
    arguments=st.dictionaries(
        st.sampled_from(["a", "b"]), VALUES | st.fixed_dictionaries({"c": VALUES}) | st.lists(VALUES, max_size=2)
    ),
    resource=st.sampled_from(["abc", "ABC", ""]),
    agent=st.sampled_from(["abc", "x"]),
    claims=st.dictionaries(st.just("weight"), VALUES),
    risk=st.integers(0, 2),
    at=st.none() | st.integers(0, 7 * 1440).map(lambda minutes: NOON_MONDAY + timedelta(minutes=minutes)),
)


def depth(tree):
    inner = [tree.condition] if isinstance(tree, Not) else getattr(tree, "conditions", ())
    return 1 + max((depth(child) for child in inner), default=0)


def slow(tree, seen: View):
    """What the tree means, in one obvious page: every part is asked, nothing is skipped."""
    match tree:
        case Not():
            return {True: False, False: True, None: None}[slow(tree.condition, seen)]
        case And() | Or():
            answers = [slow(child, seen) for child in tree.conditions]
            settled = isinstance(tree, Or)
            return settled if settled in answers else None if None in answers else not settled
        case RiskLevelIs():
            levels = list(RiskLevel)
            one, other = seen.risk, levels.index(tree.level)
            return {"eq": one == other, "le": one <= other, "ge": one >= other, "lt": one < other, "gt": one > other}[
                tree.operator
            ]
        case EvaluatorSays():
            return seen.evaluations.get(tree.evaluator_name)
        case TimeOfDay():
            return slow_time(tree, seen.at)
        case FieldIs():
            return slow_field(tree, slow_lookup(tree.path.split("."), seen.fields))


def slow_time(tree, at):
    if at is None:
        return None
    now, start, end = f"{at:%H:%M}", tree.start, tree.end
    return start <= now < end if start <= end else not (end <= now < start)


def slow_lookup(names, holder):
    for name in names:
        if isinstance(holder, list):
            holder = {str(index): each for index, each in enumerate(holder)}
        if not isinstance(holder, dict) or name not in holder:
            return "missing", None
        holder = holder[name]
    return "there", holder


def slow_field(tree, found):
    there, value = found[0] == "there", found[1]

    def equal(other):
        return (there and json.dumps(value) == json.dumps(other)) or (
            there and is_number(value) and is_number(other) and value == other
        )

    def is_number(candidate):
        return type(candidate) in (int, float)

    match tree.operator:
        case "exists":
            return there
        case "eq":
            return equal(tree.value)
        case "ne":
            return not equal(tree.value)
        case "in":
            return any(equal(each) for each in tree.value)
        case "not_in":
            return not any(equal(each) for each in tree.value)
        case "contains":
            if not there:
                return False
            return (
                any(
                    slow_field(FieldIs(path="agent", operator="eq", value=tree.value), ("there", each))
                    for each in value
                )
                if isinstance(value, list)
                else None
            )
        case "glob":
            if not there:
                return False
            return slow_glob(tree.value.lower(), value.lower()) if isinstance(value, str) else None
    try:
        number = Decimal(value) if type(value) is not bool else None
    except (TypeError, ArithmeticError, ValueError):
        number = None
    if number is None:
        return None
    bound = Decimal(str(tree.value))
    return {"le": number <= bound, "ge": number >= bound, "lt": number < bound, "gt": number > bound}[tree.operator]


def slow_glob(pattern, text):
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(slow_glob(pattern[1:], text[skip:]) for skip in range(len(text) + 1))
    return bool(text) and pattern[0] in ("?", text[0]) and slow_glob(pattern[1:], text[1:])


@given(TREES, VIEWS)
def test_the_compiled_form_answers_what_the_slow_one_does(tree, seen):
    assert compile_condition(tree, "when")(seen).holds is slow(tree, seen)


@given(TREES, VIEWS)
def test_a_tree_survives_json_and_answers_the_same(tree, seen):
    again = TREE.validate_json(TREE.dump_json(tree))
    assert again == tree
    assert compile_condition(again, "when")(seen) == compile_condition(tree, "when")(seen)


@given(TREES, VIEWS)
def test_the_named_leaves_are_as_decided_as_the_answer(tree, seen):
    found = compile_condition(tree, "when")(seen)
    assert found.leaves
    if found.holds is None:
        assert all(leaf.holds is None for leaf in found.leaves)
    else:
        assert all(leaf.holds is not None for leaf in found.leaves)


@given(TREES, VIEWS, st.dictionaries(st.just("silent"), st.booleans()))
def test_what_is_decided_stays_so_when_more_evaluators_answer(tree, seen, more):
    test = compile_condition(tree, "when")
    before = test(seen).holds
    seen.evaluations = {**seen.evaluations, **more}
    assert before is None or test(seen).holds is before


# --- patterns --------------------------------------------------------------------------------------------------------


@given(st.text(alphabet="aB*?.", min_size=1, max_size=6), st.text(alphabet="abB.\n", max_size=8))
def test_a_glob_matches_as_the_obvious_one_does(pattern, text):
    assert matcher(pattern, Match.GLOB)(text) is slow_glob(pattern.lower(), text.lower())


def test_a_pattern_that_ruins_a_backtracking_engine_takes_no_time():
    hostile = "a" * 30_000 + "!"
    assert matcher("(a*)*b", Match.REGEX)(hostile) is False
    assert matcher("*a" * 20 + "b", Match.GLOB)(hostile) is False


def test_a_text_that_is_too_long_or_no_text_is_undecided():
    for pattern, kind in itertools.product(["a*", "?a*"], Match):
        if kind is Match.REGEX and pattern.startswith("?"):
            continue
        assert matcher(pattern, kind)("a" * (LONGEST_TEXT + 1)) is None
    assert matcher("a.*", Match.REGEX)("a\ud800") is None


def test_both_sides_ignore_case():
    assert matcher("STRASSE*", Match.GLOB)("straße 1") is True
    assert matcher("ABC", Match.REGEX)("abc") is True
