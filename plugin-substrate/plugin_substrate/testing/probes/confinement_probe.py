"""A plugin that tries what it is told, with the rights that its worker has, and reports what happened."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

from plugin_substrate.interface import PluginInterface, plugin_action

_CONNECT_SECONDS = 5.0
_THREAD_SECONDS = 30.0


class ConfinementProbe(PluginInterface):
    """Each action is one attempt; its answer is ``{"done": bool, "error": errno name, "detail": text}``.

    Attempts are harmless where nothing holds them: what they make they remove, and what they start they end.
    """

    name = "confinement-probe"
    version = "1"

    def execute(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Make one attempt; a refusal by the system is an answer, not an error."""
        try:
            detail = self.run_action(action, **arguments)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, type(error).__name__)
            return {"done": False, "error": name, "detail": str(error)}
        except (MemoryError, RuntimeError) as error:  # what Python makes of a refused mapping and of a refused thread
            return {"done": False, "error": type(error).__name__, "detail": str(error)}
        return {"done": True, "error": "", "detail": str(detail)}

    @plugin_action("probe.read")
    def read(self, path: str) -> str:
        """Read the first bytes of a file."""
        with Path(path).open("rb") as file:
            return repr(file.read(40))

    @plugin_action("probe.list")
    def list_folder(self, path: str) -> str:
        """List a folder."""
        return f"{len(list(Path(path).iterdir()))} entries"

    @plugin_action("probe.write")
    def write(self, path: str) -> str:
        """Make a new file and remove it again."""
        target = Path(path)
        with target.open("xb") as file:
            file.write(b"x")
        target.unlink()
        return "written"

    @plugin_action("probe.connect")
    def connect(self, host: str, port: int) -> str:
        """Make a TCP connection."""
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return "connected"

    @plugin_action("probe.socket")
    def open_socket(self, family: str) -> str:
        """Make a socket of a family such as ``AF_INET``, of the first kind that the family has."""
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
            try:
                socket.socket(getattr(socket, family), kind).close()
            except OSError as error:
                if error.errno in (errno.ESOCKTNOSUPPORT, errno.EPROTONOSUPPORT) and kind != socket.SOCK_RAW:
                    continue
                raise
            return kind.name
        raise AssertionError("the last kind returns or raises")

    @plugin_action("probe.fork")
    def fork(self) -> str:
        """Make a process by fork, which ends at once."""
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return "forked"

    @plugin_action("probe.spawn")
    def spawn(self, command: list[str]) -> str:
        """Run a program to its end."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=_THREAD_SECONDS, check=False)
        return f"status {done.returncode}: {done.stdout.strip() or done.stderr.strip()}"

    @plugin_action("probe.signal")
    def send_signal(self, pid: int) -> str:
        """Ask whether a process may be signalled, without sending anything."""
        os.kill(pid, 0)
        return "allowed"

    @plugin_action("probe.threads")
    def threads(self, count: int) -> str:
        """Have so many threads at once."""
        release = threading.Event()
        started: list[threading.Thread] = []
        try:
            for _ in range(count):
                thread = threading.Thread(target=release.wait, args=(_THREAD_SECONDS,))
                thread.start()
                started.append(thread)
        finally:
            release.set()
            for thread in started:
                thread.join()
        return f"{len(started)} threads"

    @plugin_action("probe.memory")
    def memory(self, size: int, shared: bool = False) -> str:
        """Map and touch so many bytes, private to this process or shared as between processes."""
        flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        with mmap.mmap(-1, size, flags=flags) as region:
            for offset in range(0, size, mmap.PAGESIZE):
                region[offset] = 1
        return f"{size} bytes"

    @plugin_action("probe.file_size")
    def file_size(self, size: int) -> str:
        """Give a file of the plugin's own folder a size, without filling it, and remove it again."""
        path = self.data_dir / "confinement-probe.bin"
        try:
            with path.open("wb") as file:
                file.truncate(size)
        finally:
            path.unlink(missing_ok=True)
        return f"{size} bytes"

    @plugin_action("probe.open_files")
    def open_files(self, count: int) -> str:
        """Have so many more descriptors at once."""
        opened: list[int] = []
        try:
            while len(opened) < count:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        finally:
            for descriptor in opened:
                os.close(descriptor)
        return f"{count} descriptors"

    @plugin_action("probe.raise_limit")
    def raise_limit(self, name: str) -> str:
        """Raise the hard limit of a resource such as ``RLIMIT_NOFILE`` by one."""
        number = getattr(resource, name)
        soft, hard = resource.getrlimit(number)
        if hard == resource.RLIM_INFINITY:
            return "there is no limit"
        try:
            resource.setrlimit(number, (soft, hard + 1))
        except ValueError as error:  # what Python makes of EPERM here
            raise PermissionError(errno.EPERM, str(error)) from error
        return "raised"
