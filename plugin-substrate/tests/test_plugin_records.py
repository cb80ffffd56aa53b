"""A record is to everybody what a frozen dataclass is."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from plugin_substrate.records import field, record, replace


@record()
class Place:
    name: str
    secret: str = field(repr=False)
    size: int = 1
    parts: list[str] = field(default_factory=list)


@record()
class Town(Place):
    country: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a town has a name")


@record(kw_only=True)
class Named:
    first: str
    last: str = "x"


Twin = dataclasses.make_dataclass(
    "Place",
    [
        ("name", "str"),
        ("secret", "str", dataclasses.field(repr=False)),
        ("size", "int", dataclasses.field(default=1)),
        ("parts", "list[str]", dataclasses.field(default_factory=list)),
    ],
    frozen=True,
)


def test_it_is_made_shown_and_compared_as_a_dataclass_is() -> None:
    place, twin = Place("a", size=2, secret="s"), Twin("a", size=2, secret="s")
    assert repr(place) == repr(twin) == "Place(name='a', size=2, parts=[])"
    assert place == Place("a", "s", 2, []) != Place("a", "s", 3, [])
    assert place != twin
    assert place.parts is not Place("a", secret="s").parts
    assert hash(Named(first="a")) == hash(Named(first="a"))
    with pytest.raises(TypeError, match="unhashable"):
        hash(place)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Place("a"), "secret"),
        (lambda: Place("a", "s", 1, [], 5), "4 arguments"),
        (lambda: Place("a", name="b", secret="s"), "name twice"),
        (lambda: Place("a", secret="s", colour="red"), "colour"),
        (lambda: Named("a"), "0 arguments"),
        (Named, "first"),
    ],
)
def test_wrong_arguments_are_refused_by_name(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        make()


def test_nothing_of_it_changes() -> None:
    place = Place("a", secret="s")
    with pytest.raises(dataclasses.FrozenInstanceError, match="'name'"):
        place.name = "b"  # type: ignore[misc] # that is what is tried
    with pytest.raises(dataclasses.FrozenInstanceError, match="'name'"):
        del place.name  # type: ignore[misc]
    assert place.name == "a"


def test_one_that_derives_has_the_fields_of_both_and_its_own_check() -> None:
    town = Town("a", secret="s", country="b")
    assert (town.name, town.size, town.country) == ("a", 1, "b")
    assert town != Place("a", secret="s")
    with pytest.raises(ValueError, match="has a name"):
        replace(town, name="")


def test_it_is_copied_pickled_replaced_and_matched() -> None:
    place = Place("a", "s", 2, ["x"])
    assert copy.deepcopy(place) == pickle.loads(pickle.dumps(place)) == place  # noqa: S301 - our own
    assert dataclasses.replace(place, size=3) == replace(place, size=3) == Place("a", "s", 3, ["x"])
    match place:
        case Place(name, _, size):
            assert (name, size) == ("a", 2)
        case _:
            pytest.fail("it was not matched")


def test_dataclasses_and_inspect_know_it() -> None:
    assert dataclasses.is_dataclass(Place)
    assert [entry.name for entry in dataclasses.fields(Town)] == ["name", "secret", "size", "parts", "country"]
    assert dataclasses.asdict(Place("a", secret="s")) == {"name": "a", "size": 1, "secret": "s", "parts": []}
    assert str(inspect.signature(Named)) == "(*, first: 'str', last: 'str' = 'x') -> None"
