"""Steps run one by one as on a runner: environment, outputs, conditions, local actions, the first failure's exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / ".github" / "local" / "run.py"
WORKFLOW = """
jobs:
  one:
    env: {COLOUR: blue}
    steps:
      - uses: actions/checkout@v5
      - name: Speak
        id: speak
        env: {SIZE: "${{ matrix.size }}"}
        run: |
          echo "said=$SIZE-$COLOUR" >> "$GITHUB_OUTPUT"
          echo "KEPT=yes" >> "$GITHUB_ENV"
          echo "# Summary of $SIZE" >> "$GITHUB_STEP_SUMMARY"
      - name: Hear
        if: steps.speak.outputs.said == '7b-blue'
        env: {SAID: "${{ steps.speak.outputs.said }}"}
        run: test "$SAID $KEPT" = "7b-blue yes"
      - name: Never
        if: matrix.size == 'other'
        run: exit 1
  two:
    steps:
      - {name: Break, run: "exit 3"}
      - {name: After, run: "echo must not run > ran"}
      - {name: Tidy, if: always(), run: "echo tidied > tidied"}
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "w.yml").write_text(WORKFLOW)
    command = [sys.executable, str(RUN), str(folder / "w.yml"), "--workspace", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_steps_hear_what_steps_before_said(tmp_path: Path) -> None:
    result = run(tmp_path, "--job", "one", "--set", "matrix.size=7b")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "– actions/checkout@v5: actions/checkout@v5 is GitHub's" in result.stdout
    assert "✓ Speak (said=7b-blue)" in result.stdout
    assert "✓ Hear" in result.stdout
    assert "– Never: its condition is false" in result.stdout
    assert "# Summary of 7b" in result.stdout
    assert result.stdout.rstrip().endswith("2 run, 2 skipped, 0 failed")


def test_the_first_failure_is_the_exit_code_and_only_always_comes_after(tmp_path: Path) -> None:
    result = run(tmp_path, "--job", "two")
    assert result.returncode == 3
    assert "✗ Break: exit code 3" in result.stdout
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "tidied").exists()


@pytest.mark.parametrize("job", ["three", ""])
def test_an_unknown_job_is_named(tmp_path: Path, job: str) -> None:
    result = run(tmp_path, "--job", job)
    assert result.returncode == 1
    assert "error: --job is one of one, two" in result.stderr
