"""The small process between host and workers: fork template, child subreaper, reaper. It never imports plugin code.

It stays single-threaded, so that forking is well defined, and listens to its control socket alone. When the host is
gone, however it went, the socket ends: everything below is killed and reaped until nothing is left, then it exits.

Control messages are JSON datagrams. From the host: ``{"spawn": n, "env": {...}, "cwd": ..., "isolation": {...},
"uid": n, "bubblewrap": path}`` (null to stay who we are, and where there is no bubblewrap) with two descriptors (the
worker's socket and its log pipe); ``"group"`` is the folder of a control group that we are to enter before, or null;
with ``"template": true`` it is a template that is forked, and with ``"copy_of": m`` the worker is forked from the one
with that number, which is answered ``{"ordered": n}`` first. To the host: ``{"spawned": n, "pid": p, "lacks": {...}}``
with a pidfd (``lacks`` are layers that the worker was to have and could not be given, with the reasons), ``{"refused":
n, "reason": ...}``, and ``{"exited": n, "returncode": r, "excess": {...}}`` (a negative return code is the signal, as
in subprocess; ``excess``, when not null, is what it was killed for). ``{"stats": n}`` is answered with ``{"stats": n,
"figures": {...}}``, see `process_stats`.
"""

from __future__ import annotations

import gc
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from plugin_substrate.errors import PluginConfigError
from plugin_substrate.records import replace
from plugin_substrate.worker import confine, disk, namespaces, own_user, privileges, runtime, seccomp, watch
from plugin_substrate.worker.bubblewrap import CannotEnterError, MountNamespace, MountNamespaces
from plugin_substrate.worker.first_order import MAX_MESSAGE_BYTES, Begun, view
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker.mount_view import Views
from plugin_substrate.worker.own_user import Reach
from plugin_substrate.worker.usage import process_stats

if TYPE_CHECKING:
    from plugin_substrate.worker.templates import TemplateLink

#: What many plugins need and no first worker waits for. A supervisor that has forked two workers will fork more: it
#: imports these for them to share, one by one, as it hears nobody meanwhile, each when it was quiet for a moment.
_FOR_LATER_WORKERS = ("ast", "dis", "inspect", "dataclasses", "datetime", "urllib.parse", "pathlib")
_QUIET_SECONDS = 0.004

_WAKING = (signal.SIGCHLD, signal.SIGCONT)  # a child ended; the host died, or needs us though we were stopped
_EXIT_CHILD_FAILED = 70  # EX_SOFTWARE of sysexits.h


def supervise(control: socket.socket, host: int, begun: Begun | None = None) -> None:
    """Serve the host until its end of ``control`` is closed or it is dead; when this returns, no descendant is left.

    This process is confined already; ``begun`` is what has been begun for the first worker.
    """
    supervisor = _Supervisor(control, host, begun)
    gc.freeze()  # what is here now is shared by all workers and never garbage
    gc.enable()
    try:
        supervisor.serve()
    finally:
        supervisor.kill_everything()


class _Worker:
    def __init__(self, number: int, profile: IsolationProfile, folder: disk.FolderWatch) -> None:
        self.number = number
        self.profile = profile
        self.folder = folder
        self.excess: watch.Excess | None = None  #: what it was killed for
        self.lacks: dict[str, str] = {}  #: layers that could not be had, and why
        self.link: TemplateLink | None = None  #: when it is a template


class _Supervisor:
    def __init__(self, control: socket.socket, host: int, begun: Begun | None) -> None:
        self._control = control
        self._host = host
        self._workers: dict[int, _Worker] = {}  # by pid
        self._closed_to_others: set[tuple[str, ...]] = set()  # what a plugin's own user was found not to reach
        self._plans: dict[tuple[IsolationProfile, bool], confine.Plan] = {}
        self._views = begun.views if begun is not None else Views()
        self._mounts = MountNamespaces(begun.making if begun is not None else None)
        if begun is not None:
            self._plans[begun.plan.profile, begun.template] = begun.plan
        self._grouped = False
        self._look_at = math.inf
        self._forked = 0
        self._to_import: list[str] = []
        self._poll = select.poll()
        self._wake, wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in _WAKING:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)

    def serve(self) -> None:
        self._poll.register(self._control, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        if os.getppid() != self._host:  # it ended before its end could wake us
            return
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll(self._patience())}
            try:
                if self._wake in ready:
                    os.read(self._wake, 512)
                    self._reap()
                    if os.getppid() != self._host:  # a process that the host forked may still hold its end
                        return
                if self._control.fileno() in ready and not self._handle():
                    return
                self._hear_templates(ready)
                self._look()
                if not ready:
                    self._prepare_for_later()
            except (BrokenPipeError, ConnectionResetError):
                return

    def _handle(self) -> bool:
        """Carry out one message; False at the end of the host."""
        raw, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 2)
        if not raw:
            return False
        request = json.loads(raw)
        try:
            if "stats" in request:
                self._send({"stats": request["stats"], "figures": process_stats()})
            else:
                self._spawn(request, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _spawn(self, request: dict[str, Any], descriptors: list[int]) -> None:
        try:
            if "copy_of" in request:
                self._link_of(request["copy_of"]).place(request, descriptors)
                begun = None
            elif request.get("template"):
                begun = self._fork_template(request, descriptors)
            else:
                begun = self._fork_worker(request, descriptors)
        except (OSError, PluginConfigError) as error:
            self._send({"refused": request["spawn"], "reason": str(error)})
            return
        if begun is None:
            self._send({"ordered": request["spawn"]})
        else:
            self._began(*begun)

    def _fork_template(self, request: dict[str, Any], descriptors: list[int]) -> tuple[int, _Worker]:
        if not seccomp.can_ask():
            raise PluginConfigError(
                "this kernel has no filter that could ask before a template forks; write `preload: false` under the "
                "manifest's `overrides`"
            )
        from plugin_substrate.worker.templates import TemplateLink

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid, worker = self._fork_worker(request, [*descriptors, theirs.fileno()])
        worker.link = TemplateLink(ours, self._poll)
        return pid, worker

    def _fork_worker(self, request: dict[str, Any], descriptors: list[int]) -> tuple[int, _Worker]:
        me, profile = os.getpid(), IsolationProfile.from_json(request["isolation"])
        plan = self._plan(profile, template=request.get("template", False))
        uid = self._own_uid(request, profile)
        grouped = self._enter(request.get("group"))
        mounts, lack = self._mount_namespace(request, plan)
        try:
            pid, apart = _fork(profile, uid, mounts)
        except CannotEnterError as error:
            if mounts is not None:
                lack, mounts = self._mounts.give_up(request["bubblewrap"], mounts, error), None
            pid, apart = _fork(profile, uid, None)
        if pid == 0:
            confinement = confine.Confinement(
                plan=plan,
                folder=request["cwd"],
                parent=me,
                apart=apart,
                grouped=grouped,
                own_uid=uid,
                mounts=mounts.identity if mounts is not None else None,
            )
            _become_worker(request, confinement, descriptors)
        self._forked += 1
        if self._forked == 2:
            self._to_import = list(reversed(_FOR_LATER_WORKERS))
        worker = _worker(request, profile)
        worker.lacks = {"bubblewrap": lack} if lack else {}
        return pid, worker

    def _mount_namespace(self, request: dict[str, Any], plan: confine.Plan) -> tuple[MountNamespace | None, str]:
        """Return where the worker is to see the files that it may open, and no others; or why it sees them all.

        No reason where that is granted, or where nobody has bubblewrap.
        """
        program = request.get("bubblewrap")
        if program is None or plan.profile.file_names:
            return None, ""
        return self._mounts.get(program, view(self._views, plan, request["cwd"]))

    def _enter(self, group: str | None) -> bool:
        """Be in a control group from now on, with all that will be forked; False where that cannot be."""
        if group is not None and not self._grouped:
            with suppress(OSError):  # the worker then does not report the layer
                with open(os.path.join(group, "cgroup.procs"), "w", encoding="ascii") as members:
                    members.write("0")
                self._grouped = True
        return group is not None and self._grouped

    def _plan(self, profile: IsolationProfile, *, template: bool) -> confine.Plan:
        key = profile, template
        if key not in self._plans:
            self._plans[key] = confine.make_plan(profile, template=template)
        return self._plans[key]

    def _began(self, pid: int, worker: _Worker) -> None:
        """Look after a worker from now on, and tell the host."""
        self._workers[pid] = worker
        self._look_at = 0.0
        pidfd = os.pidfd_open(pid)  # still our unreaped child, so the pid cannot mean another process
        try:
            self._send({"spawned": worker.number, "pid": pid, "lacks": worker.lacks}, [pidfd])
        finally:
            os.close(pidfd)

    def _link_of(self, number: int) -> TemplateLink:
        for worker in self._workers.values():
            if worker.number == number and worker.link is not None:
                return worker.link
        raise PluginConfigError("its template has ended")

    def _links(self) -> list[TemplateLink]:
        return [worker.link for worker in self._workers.values() if worker.link is not None]

    def _hear_templates(self, ready: set[int]) -> None:
        for template in list(self._workers.values()):
            link = template.link
            complete = link.hear(self._workers) if link is not None and link.watched in ready else None
            if complete is not None:
                pid, order = complete
                copy = _worker(order.request, IsolationProfile.from_json(order.request["isolation"]))
                copy.lacks = template.lacks
                self._began(pid, copy)
                order.hand_over()
                self._kill_orphans()  # what was spared while this one was on its way

    def _reap(self) -> None:
        died = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            died = True
            if pid in self._workers:
                worker = self._workers.pop(pid)
                self._end_template(worker)
                self._send({
                    "exited": worker.number,
                    "returncode": os.waitstatus_to_exitcode(status),
                    "excess": vars(worker.excess) if worker.excess else None,
                })  # fmt: skip
        if died:
            self._kill_orphans()

    def _end_template(self, worker: _Worker) -> None:
        order = worker.link.close() if worker.link is not None else None
        if order is not None:
            order.close()
            self._send({"refused": order.request["spawn"], "reason": "its template has ended"})

    def _patience(self) -> float | None:
        """Return for how many milliseconds to listen: until the workers are looked at again, for ever without any."""
        if not self._workers:
            return None
        until_look = max(0.0, self._look_at - time.monotonic())
        return 1000 * (min(until_look, _QUIET_SECONDS) if self._to_import else until_look)

    def _prepare_for_later(self) -> None:
        """Import one of the modules that later workers will need; one that misses it says so itself."""
        if not self._workers or not self._to_import:
            return
        with suppress(ImportError, OSError):
            import_module(self._to_import.pop())
        if not self._to_import:
            gc.freeze()

    def _own_uid(self, request: dict[str, Any], profile: IsolationProfile) -> int | None:
        """Return the user that the worker is to run as, None for our own, and see that its folder is that user's."""
        uid, folder = request.get("uid"), request["cwd"]
        if uid is None or not own_user.may_change_user():
            return None
        needed = (*confine.environment_paths(), *confine.OUR_FILES, *profile.read_paths)
        reach = Reach.NOT_ITS_ENVIRONMENT
        if needed not in self._closed_to_others:  # to try costs a process, which no load should wait for twice
            reach = own_user.reach_of(uid, folder, needed)
            if reach is Reach.NOT_ITS_ENVIRONMENT:
                self._closed_to_others.add(needed)
        usable = reach is Reach.EVERYTHING
        own_user.give(folder, uid if usable else 0)
        return uid if usable else None

    def _look(self) -> None:
        """Kill what has grown over a bound that the kernel does not keep."""
        if not self._workers or time.monotonic() < self._look_at:
            return
        pauses: list[float] = []
        for pid, worker in self._workers.items():
            sample = watch.look_at(pid, worker.profile)
            disk_excess, disk_seconds = worker.folder.look()
            pauses += sample.next_seconds, disk_seconds
            worker.excess = worker.excess or sample.excess or disk_excess
            if worker.excess is not None:
                _kill(pid)
        self._look_at = time.monotonic() + min(pauses)

    def _kill_orphans(self) -> None:
        """Kill what dead workers left behind: each child that is no worker; its own children arrive as it is reaped.

        Not while a template is forking: the child that nobody knows may be the worker that is wanted.
        """
        if any(link.order is not None for link in self._links()):
            return
        for pid in _children():
            if pid not in self._workers:
                _kill(pid)

    def kill_everything(self) -> None:
        """Kill and reap until no child is left; descendants of the killed arrive here, as this is their subreaper."""
        while True:
            for pid in {*self._workers, *_children()}:
                _kill(pid)
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            self._workers.pop(pid, None)
            if pid == 0:
                time.sleep(0.0005)

    def _send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        socket.send_fds(self._control, [json.dumps(message).encode()], descriptors or [])


def _worker(request: dict[str, Any], profile: IsolationProfile) -> _Worker:
    return _Worker(request["spawn"], profile, disk.FolderWatch(request["cwd"], profile.disk_bytes))


def _fork(profile: IsolationProfile, uid: int | None, mounts: MountNamespace | None) -> tuple[int, bool]:
    """Fork a worker, in a process id namespace if it may have processes and one can be made; tells whether it is.

    It enters its mount namespace and changes its user first of all: that undoes what ties its end to ours. A
    `CannotEnterError` when it may not enter.
    """
    if profile.processes and sys.platform == "linux":
        try:
            return namespaces.fork_first_process(uid, mounts), True
        except OSError:
            pass  # the worker then does not report the layer
    pid = os.fork() if mounts is None else mounts.fork()
    if pid == 0 and uid is not None:
        privileges.become_or_exit(uid)
    return pid, False


def _become_worker(request: dict[str, Any], confinement: confine.Confinement, descriptors: list[int]) -> NoReturn:
    """Turn the forked child into a worker; it never returns to the supervisor's code."""
    try:
        signal.set_wakeup_fd(-1)
        for number in _WAKING:
            signal.signal(number, signal.SIG_DFL)
        is_template = request.get("template", False)
        confine.close_descriptors([descriptors[0], *descriptors[2:]], errors_to=descriptors[1])
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        connection = socket.socket(fileno=confine.FIRST_FREE_DESCRIPTOR)
        if not is_template:
            runtime.WorkerRuntime(connection, confine.confine_worker(confinement)).serve()
        from plugin_substrate.worker.template import Template

        channel = socket.socket(fileno=confine.FIRST_FREE_DESCRIPTOR + 1)
        layers = confine.confine_worker(replace(confinement, ask_through=channel))
        Template(connection, channel, confinement.plan, layers).serve()
    except BaseException:  # noqa: BLE001 - nothing may climb into the supervisor's stack
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(_EXIT_CHILD_FAILED)


def _children() -> list[int]:
    """Return this process's children, adopted ones too; the kernel may miss some that come or go meanwhile."""
    if sys.platform != "linux":
        return []
    with open(f"/proc/self/task/{threading.get_native_id()}/children", encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]


def _kill(pid: int) -> None:
    """Kill an own child: nobody else reaps it, so its number cannot have passed to another process."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
