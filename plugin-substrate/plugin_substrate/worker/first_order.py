"""What a supervisor can begin for its first worker before it has everything that it needs to be one.

Most of a first load is what a supervisor imports. bubblewrap takes a part of that time, and another processor.
"""

from __future__ import annotations

import json
import socket

from plugin_substrate.errors import PluginConfigError
from plugin_substrate.records import record
from plugin_substrate.worker import confine
from plugin_substrate.worker.bubblewrap import Making
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker.mount_view import View, Views

#: Of a message of either side.
MAX_MESSAGE_BYTES = 1 << 16


@record()
class Begun:
    """The plan of the first worker, what it will see, and bubblewrap at work on that."""

    template: bool
    plan: confine.Plan
    views: Views
    making: Making


def begin(control: socket.socket) -> Begun | None:
    """Look at the first order, which stays to be received, and begin what it will need; None where that is nothing."""
    try:
        request = json.loads(control.recv(MAX_MESSAGE_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        profile, program = IsolationProfile.from_json(request["isolation"]), request["bubblewrap"]
        if program is None or profile.file_names:
            return None
        template = request.get("template", False)
        plan, views = confine.make_plan(profile, template=template), Views()
        return Begun(template, plan, views, Making(program, view(views, plan, request["cwd"])))
    except (OSError, ValueError, KeyError, PluginConfigError):
        return None  # it has not come yet, or is another; what is wrong is told when it is carried out


def view(views: Views, plan: confine.Plan, folder: str) -> View:
    """Return what a worker is to see."""
    return views.of(confine.file_rules(plan, folder), read_only=not plan.landlock_abi)
