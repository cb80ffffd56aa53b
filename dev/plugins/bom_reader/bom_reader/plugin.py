"""The plugin: one capability, `bom.read`."""

from __future__ import annotations

from typing import Any

from plugin_substrate.errors import PluginConfigError, PluginInputError
from plugin_substrate.interface import InputFile, PluginInterface, plugin_action

from bom_reader.csv_bill import read_csv
from bom_reader.cyclonedx_json import read_cyclonedx
from bom_reader.meta import CONFIG_SCHEMA, NAME, VERSION
from bom_reader.text import decode


class BomReader(PluginInterface):
    """Brings a bill of materials into one form, whatever tool wrote it."""

    def __init__(self) -> None:
        self._max_components: int = CONFIG_SCHEMA["properties"]["max_components"]["default"]

    @property
    def name(self) -> str:
        """The plugin's name."""
        return NAME

    @property
    def version(self) -> str:
        """The plugin's version."""
        return VERSION

    def initialize(self, config: dict[str, Any]) -> None:
        """Take the limit from the configuration; a wrong one is a PluginConfigError."""
        limit = config.get("max_components", self._max_components)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise PluginConfigError(
                f"max_components must be at least 1, not {limit!r}", fields_invalid=["max_components"]
            )
        self._max_components = limit

    def get_config_schema(self) -> dict[str, Any]:
        """Return the schema of the configuration."""
        return CONFIG_SCHEMA

    def get_current_config(self) -> dict[str, Any]:
        """Return the configuration in use."""
        return {"max_components": self._max_components}

    def execute(self, *, action: str, **arguments: Any) -> Any:
        """Run the capability ``action``."""
        return self.run_action(action, **arguments)

    @plugin_action("bom.read")
    def read(self, *, bom: InputFile) -> dict[str, Any]:
        """Return the components of a CycloneDX JSON or CSV bill, and every row that could not be used.

        A file that is neither, holds no component, or too many, is a PluginInputError that says what to do.
        """
        if not isinstance(bom, InputFile):
            raise PluginInputError(f"bom must be a file, not {type(bom).__name__}", fields_invalid=["bom"])
        self.report_progress(0.0, f"reading {bom.name}")
        text = decode(bom.name, bom.data)
        match text.lstrip()[0]:
            case "{" | "[":
                bill = read_cyclonedx(bom.name, text, self.check_cancel)
            case "<":
                raise PluginInputError(
                    f"{bom.name} is XML: write the bill as JSON (cyclonedx-cli convert does)", fields_invalid=["bom"]
                )
            case _:
                bill = read_csv(bom.name, text, self.check_cancel)
        count = len(bill.components)
        if not 0 < count <= self._max_components:
            problem = f"{count} components; the limit is {self._max_components}" if count else "no usable component"
            first = f"; the first bad row: {bill.bad_rows[0].as_json()}" if bill.bad_rows else ""
            raise PluginInputError(f"{bom.name} holds {problem}{first}", fields_invalid=["bom"])
        self.report_progress(1.0, f"{count} components, {len(bill.bad_rows)} bad rows")
        self.report_usage({"component": count})
        return bill.as_json()
