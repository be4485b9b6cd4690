"""Carry out the ``run:`` steps of a workflow's job, or of a composite action, on this machine, one by one.

scripts/workflow-steps FILE [--job JOB] [--set CONTEXT.NAME=VALUE …] [--workspace DIR]

Each step gets a shell, its environment and GitHub's files, as on a runner. A local action is followed; what only GitHub has (`uses: actions/…`) is
named and skipped. The job summary is shown at the end. Exit code: that of the first step that failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from expressions import as_text, evaluate, render

ROOT = Path(__file__).resolve().parents[2]
SHELL = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
Context = dict[str, Any]


@dataclass
class Machine:
    """What a runner keeps from step to step.

    Attributes:
        files: GITHUB_OUTPUT and the like, in a folder of their own.
        environment: what steps wrote to GITHUB_ENV.
        counts: steps run, skipped, failed.
    """

    files: Path
    workspace: Path
    environment: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"run": 0, "skipped": 0, "failed": 0})
    code: int = 0

    def variables(self, context: Context) -> dict[str, str]:
        """The environment of every step."""
        names = {name: str(self.files / name.lower()) for name in ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
        given = {"GITHUB_WORKSPACE": str(self.workspace), "RUNNER_TEMP": str(self.files), "RUNNER_OS": "Linux", "CI": "true"}
        return {**os.environ, **given, **names, **self.environment, **_texts(context.get("env", {}), context)}


def run_steps(steps: list[dict[str, Any]], context: Context, machine: Machine, depth: int = 0) -> None:
    """Run some steps; after one that failed, only those that ask for it."""
    for step in steps:
        name = step.get("name") or step.get("uses") or step["run"].splitlines()[0]
        context["failed"] = machine.code != 0
        condition = str(step.get("if", "success()"))
        wanted = evaluate(condition.removeprefix("${{").removesuffix("}}"), context)
        if not wanted or (context["failed"] and not any(word in condition for word in ("always()", "failure()", "cancelled()"))):
            say("–", f"{name}: its condition is false ({condition})", depth)
            machine.counts["skipped"] += 1
        elif "run" in step:
            run_step(name, step, context, machine, depth)
        elif str(step["uses"]).startswith("./"):
            say("▸", f"{name}: {step['uses']}", depth)
            run_action(ROOT / step["uses"], step, context, machine, depth + 1)
        else:
            say("–", f"{name}: {step['uses']} is GitHub's", depth)
            machine.counts["skipped"] += 1


def run_step(name: str, step: dict[str, Any], context: Context, machine: Machine, depth: int) -> None:
    """One ``run:`` step in a shell of its own."""
    say("▸", name, depth)
    environment = machine.variables(context) | _texts(step.get("env", {}), context)
    for file in ("github_output", "github_env"):
        (machine.files / file).write_text("", encoding="utf-8")
    script = machine.files / "step.sh"
    script.write_text(as_text(render(step["run"], context)), encoding="utf-8")
    code = subprocess.run([*SHELL, script], env=environment, cwd=machine.workspace, check=False).returncode
    outputs = _pairs(machine.files / "github_output")
    machine.environment |= _pairs(machine.files / "github_env")
    context["steps"][step.get("id", name)] = {"outputs": outputs, "outcome": "failure" if code else "success"}
    machine.counts["failed" if code else "run"] += 1
    machine.code = machine.code or code
    written = ", ".join(f"{key}={value}" for key, value in outputs.items())
    say("✗" if code else "✓", f"{name}{f': exit code {code}' if code else ''}{f' ({written})' if written else ''}", depth)


def run_action(folder: Path, step: dict[str, Any], context: Context, machine: Machine, depth: int) -> None:
    """A composite action, with a step's inputs; its outputs are then the step's."""
    action = yaml.safe_load((folder / "action.yml").read_text(encoding="utf-8"))
    given = {key: render(value, context) if isinstance(value, str) else value for key, value in step.get("with", {}).items()}
    if unknown := given.keys() - action["inputs"].keys():
        raise SystemExit(f"error: {folder.name} has no input {', '.join(sorted(unknown))}")
    inputs = {key: as_text(given.get(key, entry.get("default", ""))) for key, entry in action["inputs"].items()}
    env = {**context.get("env", {}), **step.get("env", {})}
    inner = {**context, "inputs": inputs, "steps": {}, "env": _texts(env, context), "github": {**context["github"], "action_path": str(folder)}}
    run_steps(action["runs"]["steps"], inner, machine, depth)
    outputs = {key: render(entry["value"], inner) for key, entry in action.get("outputs", {}).items()}
    context["steps"][step.get("id", step.get("name", folder.name))] = {"outputs": outputs}


def say(mark: str, text: str, depth: int = 0) -> None:
    """One line, before and after a step's own output."""
    sys.stdout.write(f"{'  ' * depth}{mark} {text}\n")
    sys.stdout.flush()


def _texts(values: dict[str, Any], context: Context) -> dict[str, str]:
    return {key: as_text(render(value, context) if isinstance(value, str) else value) for key, value in values.items()}


def _pairs(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text(encoding="utf-8").splitlines() if "=" in line)


def _context(settings: list[str]) -> Context:
    """Empty contexts, with what was set: ``matrix.size=demo``."""
    names = ("inputs", "matrix", "needs", "vars", "secrets", "env", "steps", "github", "runner")
    context: Context = {name: {} for name in names} | {"failed": False}
    context["github"] |= {"ref": "refs/heads/main", "workspace": str(ROOT)}
    for setting in settings:
        path, _, value = setting.partition("=")
        *parents, last = path.split(".")
        inner = context
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return context


def main() -> int:
    """Parse, run, tell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="a workflow, or an action.yml")
    parser.add_argument("--job", help="which job of a workflow")
    parser.add_argument("--set", action="append", default=[], metavar="CONTEXT.NAME=VALUE", help="inputs.precisions='fp16 int8', matrix.size=demo")
    parser.add_argument("--workspace", type=Path, default=ROOT, help="where the steps run")
    options = parser.parse_args()
    context = _context(options.set)
    with tempfile.TemporaryDirectory(prefix="workflow-steps-") as folder:
        machine = Machine(Path(folder), options.workspace.resolve())
        (machine.files / "github_step_summary").touch()
        if options.file.name == "action.yml":
            run_action(options.file.resolve().parent, {"with": context["inputs"]}, context, machine, 0)
        else:
            jobs = yaml.safe_load(options.file.read_text(encoding="utf-8"))["jobs"]
            if options.job not in jobs:
                raise SystemExit(f"error: --job is one of {', '.join(jobs)}")
            context["env"] |= jobs[options.job].get("env", {})
            run_steps(jobs[options.job]["steps"], context, machine)
        summary = (machine.files / "github_step_summary").read_text(encoding="utf-8")
        say("=", f"job summary: {len(summary):,} characters\n{summary[:1500]}" if summary else "no job summary")
    say("=", ", ".join(f"{count} {what}" for what, count in machine.counts.items()))
    return machine.code


if __name__ == "__main__":
    sys.exit(main())
