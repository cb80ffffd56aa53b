"""The plugin: one capability, `bom.review`."""

from __future__ import annotations

from typing import Any

from plugin_substrate.interface import PluginInterface, plugin_action

from license_reviewer.arguments import parts_of, policy_of
from license_reviewer.findings import Part
from license_reviewer.meta import NAME, VERSION
from license_reviewer.review import review

MAX_REPORTS = 500


class LicenseReviewer(PluginInterface):
    """Rates what the licenses of a bill's components ask for."""

    @property
    def name(self) -> str:
        """The plugin's name."""
        return NAME

    @property
    def version(self) -> str:
        """The plugin's version."""
        return VERSION

    def execute(self, *, action: str, **arguments: Any) -> Any:
        """Run the capability ``action``."""
        return self.run_action(action, **arguments)

    @plugin_action("bom.review")
    def review(
        self,
        *,
        components: list[dict[str, Any]],
        severities: dict[str, str] | None = None,
        block_at: str = "high",
        list_means: str = "all",
    ) -> dict[str, Any]:
        """Return findings, their counts, the licenses, and the components to stop using.

        ``severities`` rates kinds of findings anew, ``block_at`` is the least severity that blocks, ``list_means`` says
        whether all licenses of a list hold or any may be chosen. Components or knobs of another form are a
        PluginInputError that names them.
        """
        parts = parts_of(components)
        policy = policy_of(severities or {}, block_at, list_means)
        stride = -(-len(parts) // MAX_REPORTS)

        def tick(index: int, part: Part) -> None:
            self.check_cancel()
            if index % stride == 0:
                self.report_progress(index / len(parts), f"{index + 1} of {len(parts)}: {part.name}")

        result = review(parts, policy, tick)
        self.report_progress(1.0, f"{result['summary']['findings']} findings")
        self.report_usage({"component": len(parts)})
        return result
