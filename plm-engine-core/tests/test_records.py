"""Records that are made at once are the frozen dataclasses that they would be otherwise."""

from __future__ import annotations

import copy
import inspect
from dataclasses import FrozenInstanceError, dataclass, field, replace

import pytest
from plm_engine_core.control_plane import Outcome, Proposal
from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.policy import Facts
from plm_engine_core.control_plane.records import made_at_once
from plm_engine_core.control_plane.storage.ports import AdmitCommand, SettleCommand


@dataclass(frozen=True, kw_only=True)
class Plain:
    """As Python makes it."""

    name: str
    tags: list[str] = field(default_factory=list)
    size: int = 3
    asked: list[str] | None = None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"{self.name} has no size")


@made_at_once
@dataclass(frozen=True, kw_only=True)
class Quick(Plain):
    """The same, made at once."""


@pytest.mark.parametrize(
    "given",
    [{"name": "a"}, {"name": "a", "tags": ["x"], "size": 0, "asked": []}, {"size": 7, "name": "b"}],
    ids=["defaults", "everything", "any order"],
)
def test_a_record_holds_what_it_was_given_and_the_defaults_of_the_rest(given):
    made = Quick(**given)
    assert vars(made) == vars(Plain(**given))
    assert made == Quick(**given)
    assert replace(made, size=9) == Quick(**{**given, "size": 9})
    assert copy.deepcopy(made) == made


@pytest.mark.parametrize("given", [{}, {"name": "a", "colour": "red"}], ids=["missing", "unknown"])
def test_a_record_refuses_what_is_missing_or_unknown_in_the_words_of_python(given):
    with pytest.raises(TypeError) as expected:
        Plain(**given)
    with pytest.raises(TypeError) as refused:
        Quick(**given)
    assert str(refused.value).removeprefix("Quick") == str(expected.value).removeprefix("Plain")


def test_a_record_takes_keywords_only_and_is_checked_after_it_was_made():
    with pytest.raises(TypeError):
        Quick("a")
    with pytest.raises(ValueError, match="a has no size"):
        Quick(name="a", size=-1)


def test_each_record_has_a_default_of_its_own():
    assert Quick(name="a").tags is not Quick(name="a").tags


def test_nothing_of_a_record_can_be_changed():
    made = Quick(name="a")
    with pytest.raises(FrozenInstanceError):
        made.name = "b"
    with pytest.raises(FrozenInstanceError):
        del made.name


@pytest.mark.parametrize("kind", [AdmitCommand, Facts, Grant, Outcome, Proposal, SettleCommand])
def test_what_a_booking_makes_is_described_as_the_dataclass_that_it_is(kind):
    takes = inspect.signature(kind).parameters
    assert list(takes) == list(kind.__dataclass_fields__)
    assert {each.kind for each in takes.values()} == {inspect.Parameter.KEYWORD_ONLY}
