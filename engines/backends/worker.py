"""Run a compiler in a process of its own: a crash in native code becomes an error, its memory comes back, and its peak is known exactly.

The worker is a module of this project, run with the request as JSON on its stdin. It answers in JSON lines on stdout:
``{"log": [level, text]}``, ``{"progress": [what, done, total]}``, and at the end ``{"result": {…}}`` or ``{"error": text, "hint": text}``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from artifact.errors import EngineError
from artifact.progress import Progress

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
SAMPLE_S = 0.02
KILLED = (signal.SIGKILL, signal.SIGTERM)
MEGABYTE = 10**6
USE_RTX = "POLYGRAPHY_USE_TENSORRT_RTX"
"""Which TensorRT a worker builds with, and Polygraphy with it: ``1`` is TensorRT-RTX, ``0`` enterprise TensorRT."""


class PeakMemory(threading.Thread):
    """Samples a process's memory until it ends; peaks in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self.resident, self.anonymous = 0, 0

    def run(self) -> None:
        """Sample; a process that is gone ends it."""
        try:
            while not self._done.wait(SAMPLE_S):
                memory = self._process.memory_info()
                self.resident = max(self.resident, memory.rss)
                self.anonymous = max(self.anonymous, memory.rss - getattr(memory, "shared", 0))
        except psutil.Error:
            return

    def stop(self) -> None:
        """End sampling and wait for the last sample."""
        self._done.set()
        self.join()


def run_worker(module: str, request: Mapping[str, Any], environment: Mapping[str, str], progress: Progress) -> tuple[dict[str, Any], PeakMemory]:
    """Run ``module`` with a request; give its result and its memory.

    Args:
        module: run with ``python -m``.
        request: sent as JSON.
        environment: variables that are set for the worker alone.
        progress: told what the worker tells.

    Raises:
        EngineError: the worker's own error, or how it died.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=variables,
            text=True,
            errors="replace",
        )
        peak = PeakMemory(process.pid)
        peak.start()
        try:
            answer = _converse(process, request, progress)
        finally:
            _end(process)
            peak.stop()
        errors.seek(0)
        last_words = errors.read()[-2000:].strip()
    if last_words:
        logger.debug("%s: %s", module, last_words)
    if "result" in answer:
        return answer["result"], peak
    if "error" in answer:
        raise EngineError(answer["error"], hint=answer.get("hint"))
    raise _death(module, process.returncode, last_words, peak)


def _converse(process: subprocess.Popen[str], request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Send the request, pass on what comes, and give the last answer; an empty one where there is none."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as stdin:
            stdin.write(json.dumps(request))
    except BrokenPipeError:  # it died at once: its exit status tells why
        return {}
    return _answer(process.stdout, progress)


def _answer(lines: IO[str], progress: Progress) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    with lines:
        for line in lines:
            message = _parse(line)
            if "log" in message:
                level, text = message["log"]
                logger.log(level, "%s", text)
            elif "progress" in message:
                progress(*message["progress"])
            elif message:
                answer = message
    return answer


def _parse(line: str) -> dict[str, Any]:
    """A message; what else the compiler prints is logged and counts as none."""
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if isinstance(message, dict):
        return message
    logger.debug("%s", line.rstrip())
    return {}


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a worker that has said its last word; end one that has not (an interrupt)."""
    if sys.exc_info()[0] is not None:
        process.kill()
    process.wait()


def _death(module: str, status: int, last_words: str, peak: PeakMemory) -> EngineError:
    memory = f"it had used {peak.resident // MEGABYTE:,} MB"
    if -status in KILLED:
        return EngineError(
            f"the compiler ({module}) was killed by {signal.Signals(-status).name}; {memory}",
            hint="most often the machine ran out of memory: free some, or build on a machine with more",
        )
    how = f"crashed with {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status} and no result"
    last_line = last_words.splitlines()[-1] if last_words else "nothing on stderr"
    return EngineError(f"the compiler ({module}) {how}; {memory}; its last words: {last_line}", hint="python cli.py --verbose build … shows its log")
