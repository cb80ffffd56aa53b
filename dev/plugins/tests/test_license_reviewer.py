from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import InputFile

Call = Callable[..., Any]


def component(*licenses: str, name: str = "thing", version: str = "1.0", purl: str = "") -> dict[str, Any]:
    return {"name": name, "version": version, "purl": purl, "licenses": list(licenses)}


def found(review: dict[str, Any]) -> list[tuple[str, str]]:
    return [(finding["kind"], finding["severity"]) for finding in review["findings"]]


def test_the_environment_holds_missing_unknown_and_copyleft_licenses(
    call: Call, sample: Callable[[str], InputFile]
) -> None:
    read = call("bom.read", bom=sample("environment.cdx.json"))
    review = call("bom.review", components=read["components"])
    assert review["summary"]["by_kind"] == {
        "copyleft-strong": 8,
        "copyleft-weak": 7,
        "imprecise": 6,
        "missing": 3,
        "unknown": 2,
        "copyleft-network": 1,
    }
    assert review["summary"]["by_severity"] == {"medium": 16, "low": 6, "high": 5}
    assert [entry["component"] for entry in review["blocking"]] == [
        "EbookLib",
        "fuzzywuzzy",
        "html2text",
        "Unidecode",
        "yamllint",
    ]


def test_the_assembly_holds_parts_in_several_versions_and_one_that_is_not_compliant(
    call: Call, sample: Callable[[str], InputFile]
) -> None:
    read = call("bom.read", bom=sample("assembly.csv"))
    review = call("bom.review", components=read["components"])
    several = [one for one in review["findings"] if one["kind"] == "several-versions"]
    assert [(one["component"], one["version"]) for one in several] == [
        ("EG-PCB-0210", "A, B"),
        ("SW-JSON", "2.8, 3.11"),
    ]
    assert review["blocking"][0] == {
        "component": "CON-PWR-24V",
        "version": "A",
        "reason": "noncompliant: not RoHS compliant",
    }


@pytest.mark.parametrize(
    ("stated", "expression"),
    [
        ("mit", "MIT"),
        ("The MIT License", "MIT"),
        ("License :: OSI Approved :: MIT License", "MIT"),
        ("Apache License, Version 2.0", "Apache-2.0"),
        ("Apache 2.0", "Apache-2.0"),
        ("BSD 3-Clause License", "BSD-3-Clause"),
        ("PSFL", "PSF-2.0"),
        ("LGPL-2.1", "LGPL-2.1-only"),
        ("GPLv2+", "GPL-2.0-or-later"),
        ("GPL v3", "GPL-3.0-only"),
        ("GNU LGPL", "LGPL-2.0-or-later"),
        ("License :: OSI Approved :: GNU Affero General Public License v3 or later (AGPLv3+)", "AGPL-3.0-or-later"),
        ("License :: OSI Approved :: GNU Lesser General Public License v2 (LGPLv2)", "LGPL-2.0-only"),
        ("License :: OSI Approved :: GNU General Public License (GPL)", "GPL-1.0-or-later"),
        ("License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0"),
        ("(mit or gpl-2.0+) and Zlib", "Zlib AND (GPL-2.0-or-later OR MIT)"),
    ],
)
def test_names_and_classifiers_become_spdx_expressions(call: Call, stated: str, expression: str) -> None:
    assert list(call("bom.review", components=[component(stated)])["licenses"]) == [expression]


@pytest.mark.parametrize(
    "stated",
    [
        "See LICENSE.txt",
        "(MIT OR",
        "MIT OR Nobodys-License",
        "GPL or LGPL",
        "GPL 7",
        "Classpath-exception-2.0",
        "::",
        "AND",
    ],
)
def test_what_is_not_known_for_certain_is_unknown(call: Call, stated: str) -> None:
    assert found(call("bom.review", components=[component(stated)])) == [("unknown", "medium")]


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["MIT"], []),
        ([], [("missing", "medium")]),
        ([" "], [("missing", "medium")]),
        (["AGPL-3.0-only"], [("copyleft-network", "high")]),
        (["GPL-3.0-only"], [("copyleft-strong", "high")]),
        (["MPL-2.0"], [("copyleft-weak", "medium")]),
        (["BUSL-1.1"], [("restricted", "medium")]),
        (["MIT OR GPL-3.0-only"], []),
        (["MIT AND GPL-3.0-only"], [("copyleft-strong", "high")]),
        (["GPL-2.0-only WITH Classpath-exception-2.0"], [("copyleft-weak", "medium")]),
        (["AGPL-3.0-only WITH Classpath-exception-2.0"], [("copyleft-network", "high")]),
        (["MIT", "GPL-3.0-only"], [("copyleft-strong", "medium")]),
        (["Apache-2.0", "License :: OSI Approved :: Apache Software License"], []),
        (["License :: OSI Approved :: BSD License"], [("imprecise", "low")]),
        (["RoHS; REACH"], []),
        (["RoHS: no"], [("noncompliant", "high")]),
        (["not RoHS compliant", "GPL-3.0-only"], [("noncompliant", "high"), ("copyleft-strong", "high")]),
    ],
)
def test_each_license_is_rated_by_how_far_it_reaches(
    call: Call, licenses: list[str], expected: list[tuple[str, str]]
) -> None:
    assert found(call("bom.review", components=[component(*licenses)])) == expected


def test_a_list_may_be_declared_a_choice(call: Call) -> None:
    listed = [component("MIT", "GPL-3.0-only")]
    assert call("bom.review", components=listed, list_means="any")["findings"] == []


def test_severities_and_the_level_that_blocks_can_be_chosen(call: Call) -> None:
    review = call("bom.review", components=[component()], severities={"missing": "low"}, block_at="low")
    assert found(review) == [("missing", "low")]
    assert [entry["component"] for entry in review["blocking"]] == ["thing"]


def test_versions_of_one_major_release_weigh_less(call: Call) -> None:
    def versions(first: str, second: str) -> list[tuple[str, str]]:
        parts = [component("MIT", version=one, purl=f"pkg:pypi/thing@{one}") for one in (first, second)]
        return found(call("bom.review", components=parts))

    assert versions("1.2", "1.3") == [("several-versions", "low")]
    assert versions("1.2", "2.0") == [("several-versions", "medium")]
    assert versions("1.2", "1.2") == []


def test_progress_names_every_component_and_the_result_never_varies(
    call: Call, sample: Callable[[str], InputFile]
) -> None:
    components = call("bom.read", bom=sample("assembly.csv"))["components"]
    messages: list[str] = []
    first = call("bom.review", components=components, on_progress=lambda _, message: messages.append(message))
    assert messages[:-1] == [
        f"{index} of {len(components)}: {one['name']}" for index, one in enumerate(components, start=1)
    ]
    assert call("bom.review", components=list(reversed(components)))["findings"] == first["findings"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"components": []}, "components"),
        ({"components": [component("MIT"), {"name": ""}]}, "components[1].name"),
        ({"components": [{"name": "a", "licenses": "MIT"}]}, "components[0].licenses"),
        ({"components": [component()], "block_at": "never"}, "block_at"),
        ({"components": [component()], "severities": {"missing": "dire"}}, "severities.missing"),
        ({"components": [component()], "list_means": "both"}, "list_means"),
    ],
)
def test_a_wrong_argument_is_named(call: Call, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(PluginInputError) as caught:
        call("bom.review", **arguments)
    assert caught.value.fields_invalid == (field,)
