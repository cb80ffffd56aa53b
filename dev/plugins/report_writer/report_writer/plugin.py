"""The plugin: `bom.report`, and `bom.quarantine`, which changes something in the world."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from plugin_substrate.interface import OutputFile, PluginInterface, plugin_action

from report_writer.chart import draw_chart
from report_writer.content import blocking_of, content_of, wrong
from report_writer.journal import Effect, Journal
from report_writer.meta import NAME, VERSION
from report_writer.page import render_page

_LIST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")


class ReportWriter(PluginInterface):
    """Turns a review into a page to read and a list to act on."""

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

    @plugin_action("bom.report")
    def report(self, *, title: str, bill: dict[str, Any], review: dict[str, Any]) -> dict[str, Any]:
        """Return the report as a page and its chart as a picture, from the outputs of `bom.read` and `bom.review`.

        Arguments of another form are a PluginInputError that names the value.
        """
        content = content_of(title, bill, review)
        self.report_progress(0.1, "drawing the chart")
        chart = draw_chart(content, self.data_dir / "matplotlib")
        self.check_cancel()
        self.report_progress(0.8, "writing the page")
        page = render_page(content, chart)
        self.check_cancel()
        self.report_progress(1.0, f"{len(content.findings)} findings in {len(page) // 1024} KiB")
        self.report_usage({"report": 1})
        return {
            "report": OutputFile("report.html", "text/html", page),
            "chart": OutputFile("chart.png", "image/png", chart),
            "findings": len(content.findings),
        }

    @plugin_action("bom.quarantine")
    def quarantine(self, *, list_name: str, blocking: list[dict[str, str]]) -> dict[str, Any]:
        """Write the list of the components to stop using, once per step key, and return it.

        A repeat under the same key returns the first result. A call without a step key, with arguments of another form,
        or under a key that was used with other arguments is a PluginInputError, and nothing is written.
        """
        if not isinstance(list_name, str) or not _LIST_NAME.fullmatch(list_name):
            raise wrong(
                "list_name", "must be 1 to 64 letters, digits, spaces or . _ - and begin with a letter or digit"
            )
        if not self.call.step_key:
            raise wrong("step_key", "is missing: a write needs one, so that a repeated step is applied once")
        components = [vars(entry) for entry in blocking_of("blocking", blocking)]
        document = json.dumps({"list": list_name, "run": self.call.run_id, "components": components}, indent=2) + "\n"
        self.check_cancel()
        recorded = Journal(self.data_dir / "blocking-lists").apply(
            Effect(
                tenant_id=self.call.tenant_id,
                step_key=self.call.step_key,
                digest=hashlib.sha256(document.encode()).hexdigest(),
                document=document,
            )
        )
        self.report_progress(1.0, f"{len(components)} components on {list_name}")
        self.report_usage({"list": 1})
        return {
            "list": OutputFile("blocking-list.json", "application/json", recorded.document.encode()),
            "count": len(components),
        }
