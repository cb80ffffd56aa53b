"""Drives the ffmpeg program that imageio-ffmpeg carries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imageio_ffmpeg
from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import InputFile, OutputFile, PluginInterface, plugin_action


class Transcoder(PluginInterface):
    name = "transcoder"
    version = "1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        self._config = config

    def get_config_schema(self) -> dict[str, Any]:
        return {}

    def get_current_config(self) -> dict[str, Any]:
        return self._config

    def execute(self, action: str, **arguments: Any) -> Any:
        return self.run_action(action, **arguments)

    @plugin_action("media.about")
    def about(self) -> dict[str, str]:
        return {"python": sys.version.split()[0], "ffmpeg": imageio_ffmpeg.get_ffmpeg_version()}

    @plugin_action("media.audio")
    def audio(self, sound: InputFile, rate: int) -> OutputFile:
        """Turn a sound file into FLAC of another rate, through files."""
        with TemporaryDirectory() as folder:
            source, target = Path(folder, "source"), Path(folder, "target.flac")
            source.write_bytes(sound.data)
            self._run("-i", str(source), "-ar", str(rate), str(target))
            return OutputFile(f"{Path(sound.name).stem}.flac", "audio/flac", target.read_bytes())

    @plugin_action("media.video")
    def video(self, frames: bytes, width: int, height: int) -> OutputFile:
        """Turn raw RGB frames into a Matroska video, through pipes."""
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25", "-i", "pipe:0"]
        video = self._run(*raw, "-c:v", "ffv1", "-f", "matroska", "pipe:1", given=frames)
        return OutputFile("video.mkv", "video/x-matroska", video)

    @plugin_action("media.endless")
    def endless(self) -> None:
        """Work until the call is cancelled; ffmpeg is ended then."""
        process = subprocess.Popen(
            self._command("-re", "-f", "lavfi", "-i", "anullsrc", "-f", "null", "-"), stdin=subprocess.DEVNULL
        )
        with self.cancel_signal_to(process.kill):
            self.report_progress(-1, "running")
            process.wait()
        self.check_cancel()

    def _run(self, *arguments: str, given: bytes = b"") -> bytes:
        done = subprocess.run(self._command(*arguments), input=given, capture_output=True, check=False)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()
            raise PluginInputError(f"ffmpeg failed with status {done.returncode}: {said}")
        return done.stdout

    def _command(self, *arguments: str) -> list[str]:
        return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *arguments]
