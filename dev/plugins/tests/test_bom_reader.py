from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import InputFile

Call = Callable[..., Any]


def bill(text: str | bytes, name: str = "bill") -> InputFile:
    return InputFile(name, "application/octet-stream", text if isinstance(text, bytes) else text.encode())


def cyclonedx(components: list[Any], version: str = "1.6") -> InputFile:
    return bill(json.dumps({"bomFormat": "CycloneDX", "specVersion": version, "components": components}))


def test_the_bill_of_the_cyclonedx_tool_is_read_whole(call: Call, sample: Callable[[str], InputFile]) -> None:
    read = call("bom.read", bom=sample("environment.cdx.json"))
    assert (read["format"], read["spec_version"], read["component_count"]) == ("cyclonedx-json", "1.6", 44)
    assert read["bad_rows"] == []
    assert read["column_mapping"] is None
    first = read["components"][0]
    assert (first["name"], first["purl"], first["licenses"]) == (
        "EbookLib",
        "pkg:pypi/ebooklib@0.20",
        ["AGPL-3.0-or-later"],
    )


def test_every_bad_row_of_a_csv_bill_is_reported_with_line_and_reason(
    call: Call, sample: Callable[[str], InputFile]
) -> None:
    file = sample("assembly.csv")
    read = call("bom.read", bom=file)
    assert read["bad_rows"] == [
        {"line": 18, "reason": "the quantity is missing", "kept": True},
        {"line": 23, "reason": "quantity '-4' is not a positive number", "kept": True},
        {"line": 25, "reason": "the header row again", "kept": False},
        {"line": 31, "reason": "quantity 'about 2' is not a positive number", "kept": True},
        {"line": 44, "reason": "no name, part number or description", "kept": False},
        {"line": 46, "reason": "8 cells under 7 headers: an unquoted delimiter?", "kept": False},
    ]
    rows_below_headers = len(file.data.splitlines()) - 3
    dropped = sum(not row["kept"] for row in read["bad_rows"])
    assert read["component_count"] == len(read["components"]) == rows_below_headers - dropped


def test_the_mapping_of_the_headers_is_shown_with_what_was_left_out(
    call: Call, sample: Callable[[str], InputFile]
) -> None:
    read = call("bom.read", bom=sample("assembly.csv"))
    assert read["column_mapping"] == {
        "ref": "Part No.",
        "description": "Item Description",
        "version": "Rev",
        "quantity": "Qty",
        "supplier": "Vendor",
        "licenses": "License / Compliance",
    }
    assert read["unmapped_columns"] == ["Remarks"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_and_encoding_are_found(call: Call, encoding: str, delimiter: str) -> None:
    rows = [["Artikel", "MPN", "Qty", "Manufacturer", "Licence"], ["Düse", "D-1", "2", "Müller", "MIT"]]
    read = call("bom.read", bom=bill("\r\n".join(delimiter.join(row) for row in rows).encode(encoding)))
    only = read["components"][0]
    assert (only["ref"], only["supplier"], only["quantity"], only["licenses"]) == ("D-1", "Müller", 2.0, ["MIT"])
    assert read["bad_rows"] == []


def test_a_decimal_comma_is_a_number_only_where_the_comma_does_not_part_cells(call: Call) -> None:
    read = call("bom.read", bom=bill('Part;Qty\nwire;"0,5"\n'))
    assert read["components"][0]["quantity"] == 0.5
    read = call("bom.read", bom=bill('Part,Qty\nwire,"1,000"\n'))
    assert read["bad_rows"] == [{"line": 2, "reason": "quantity '1,000' is not a positive number", "kept": True}]


def test_a_row_after_a_cell_of_several_lines_has_its_own_line_number(call: Call) -> None:
    read = call("bom.read", bom=bill('Part,Qty\n"a\nb",1\nc,none\n'))
    assert [one["line"] for one in read["components"]] == [2, 4]
    assert read["bad_rows"][0]["line"] == 4


def test_a_component_that_breaks_the_schema_is_reported_and_the_rest_is_read(call: Call) -> None:
    good = {"type": "library", "name": "good", "version": "1"}
    nested = {**good, "components": [{"type": "library", "name": 7}]}
    unlisted = {**good, "name": "odd", "licenses": [{"license": {"id": "Nobodys-License"}}]}
    read = call("bom.read", bom=cyclonedx([nested, {"type": "library"}, unlisted, "text"]))
    assert [one["name"] for one in read["components"]] == ["good", "odd"]
    assert {(row["path"], row["kept"]) for row in read["bad_rows"]} == {
        ("components[0].components[0]", False),
        ("components[1]", False),
        ("components[2]", True),
        ("components[3]", False),
    }
    assert all(row["reason"] for row in read["bad_rows"])


@pytest.mark.parametrize("version", ["1.2", "1.3", "1.4", "1.5", "1.6", "1.7"])
def test_every_json_version_of_the_specification_is_read(call: Call, version: str) -> None:
    read = call("bom.read", bom=cyclonedx([{"type": "library", "name": "a", "version": "1"}], version))
    assert (read["spec_version"], read["component_count"], read["bad_rows"]) == (version, 1, [])


def test_names_cannot_carry_control_or_direction_characters(call: Call) -> None:
    read = call("bom.read", bom=bill("Part,Qty\n\x1b[2Jevil\u202egpj,1\n"))
    assert read["components"][0]["name"] == "[2Jevil gpj"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (b"PK\x03\x04rest", "save the sheet as CSV"),
        (b"\xff\xfea\x00", "save it as UTF-8"),
        (b"a,b\x00\n", "is not text"),
        (b"{broken", "starts like JSON"),
        (b"[1]", "no JSON object"),
        (b'{"spdxVersion": "SPDX-2.3"}', "convert it to CycloneDX JSON"),
        (b'{"bomFormat": "CycloneDX"}', "no specVersion"),
        (b'{"bomFormat": "CycloneDX", "specVersion": "9.9", "components": [{"name": "a"}]}', "one of 1.2 to 1.7"),
        (b'{"bomFormat": "CycloneDX", "specVersion": "1.6"}', "no usable component"),
        (b"<bom/>", "write the bill as JSON"),
        (b"just a text\n", "Name the columns"),
        (b"Part,Qty\n,,,\n", "no usable component"),
        (b'Part,Qty\n"open,1\n', "not readable as CSV"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_what_to_do(call: Call, content: bytes, says: str) -> None:
    with pytest.raises(PluginInputError, match=says) as caught:
        call("bom.read", bom=bill(content))
    assert caught.value.fields_invalid == ("bom",)


def test_the_readers_environment_makes_a_bill_of_a_python_environment(call: Call, plugins_dir: Path) -> None:
    command = plugins_dir / "envs" / "bom-reader" / "bin" / "cyclonedx-py"
    made = subprocess.run([command, "environment", sys.executable], capture_output=True, timeout=120, check=True)
    read = call("bom.read", bom=bill(made.stdout, "environment.json"))
    assert "pytest" in {one["name"] for one in read["components"]}
