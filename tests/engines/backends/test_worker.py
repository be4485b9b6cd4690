"""engines/backends/worker.py: what a worker says arrives, and how it dies is told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from artifact.errors import EngineError
from artifact.progress import Progress, silent
from engines.backends.worker import MEGABYTE, ROOT, PeakMemory, run_worker

HELLO = """
import json, os, sys
request = json.loads(sys.stdin.read())
say = lambda **message: print(json.dumps(message), flush=True)
"""


def run(tmp_path: Path, body: str, progress: Progress = silent) -> tuple[dict[str, object], PeakMemory]:
    (tmp_path / "a_worker.py").write_text(HELLO + body)
    return run_worker("a_worker", {"number": 7}, {"PYTHONPATH": f"{ROOT}:{tmp_path}", "ONLY_HERE": "yes"}, progress)


def test_passes_request_progress_log_and_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[str, int, int]] = []
    body = """
say(progress=["half", 1, 2])
print("a line of something else")
print("7")
say(log=[20, "hello"])
say(result={"twice": 2 * request["number"], "environment": os.environ["ONLY_HERE"]})
"""
    with caplog.at_level(logging.DEBUG, "engines.backends.worker"):
        result, _ = run(tmp_path, body, lambda *told_now: told.append(told_now))
    assert result == {"twice": 14, "environment": "yes"}
    assert told == [("half", 1, 2)]
    assert ("engines.backends.worker", logging.INFO, "hello") in caplog.record_tuples
    assert "a line of something else" in caplog.messages


def test_its_error_is_raised_with_its_hint(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such op") as error:
        run(tmp_path, 'say(error="no such op", hint="do that")')
    assert error.value.hint == "do that"


@pytest.mark.parametrize(
    ("body", "words", "hint"),
    [
        ("os.abort()", "crashed with SIGABRT", "--verbose"),
        ("os.kill(os.getpid(), 11)", "crashed with SIGSEGV", "--verbose"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL", "ran out of memory"),
        ("raise RuntimeError('bad bug')", "exit code 1 and no result; .*RuntimeError: bad bug", "--verbose"),
        ("sys.exit(0)", "exit code 0 and no result", "--verbose"),
    ],
)
def test_death_is_an_error_that_tells_how(tmp_path: Path, body: str, words: str, hint: str) -> None:
    with pytest.raises(EngineError, match=words) as error:
        run(tmp_path, body)
    assert hint in (error.value.hint or "")


def test_measures_the_peak_of_the_worker(tmp_path: Path) -> None:
    body = 'import time\nblock = b"1" * 200_000_000\ntime.sleep(0.2)\ndel block\ntime.sleep(0.1)\nsay(result={})'
    _, peak = run(tmp_path, body)
    assert 200 * MEGABYTE <= peak.anonymous <= peak.resident < 300 * MEGABYTE


def test_an_interrupt_ends_the_worker(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    marker = tmp_path / "went on"
    body = f'import time\nsay(progress=["x", 0, 1])\ntime.sleep(2)\nopen({str(marker)!r}, "w")'
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, body, stop)
    assert not marker.exists()
