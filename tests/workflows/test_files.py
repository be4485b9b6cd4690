"""What actionlint can't see: no expression inside a script, permissions, pinned actions, inputs that the local action has, scripts that parse."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
Step = dict[str, Any]


def steps_of(path: Path) -> Iterator[Step]:
    parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "action.yml":
        yield from parsed["runs"]["steps"]
    else:
        for job in parsed["jobs"].values():
            yield from job["steps"]


ALL = [(path, step) for path in (*WORKFLOWS, *ACTIONS) for step in steps_of(path)]
RUN = [(path, step) for path, step in ALL if "run" in step]
IDS = [f"{path.parent.name}/{path.name}: {step.get('name')}" for path, step in RUN]


def test_there_is_what_the_readme_names() -> None:
    assert {path.stem for path in WORKFLOWS} >= {"ci", "engines"}
    assert [path.parent.name for path in ACTIONS] == ["build-engine"]


@pytest.mark.parametrize(("path", "step"), RUN, ids=IDS)
def test_script_holds_no_expression_and_parses(path: Path, step: Step) -> None:
    assert "${{" not in step["run"], "an expression in a script can be injected into: give it through env"
    assert step.get("name")
    assert path.name != "action.yml" or step.get("shell") == "bash"
    subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True, timeout=10)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_may_read_and_nothing_else(path: Path) -> None:
    parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert parsed["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] for job in parsed["jobs"].values())
    checkouts = [step for step in steps_of(path) if str(step.get("uses", "")).startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_actions_of_others_are_githubs_own_and_pinned() -> None:
    used = [step["uses"] for _, step in ALL if "uses" in step and not step["uses"].startswith("./")]
    assert used
    assert [name for name in used if not re.fullmatch(r"actions/[a-z-]+(/[a-z-]+)?@(v\d+|[0-9a-f]{40})", name)] == []


def test_local_action_gets_inputs_that_it_has() -> None:
    for path, step in ALL:
        if str(step.get("uses", "")).startswith("./"):
            action = yaml.safe_load((ROOT / step["uses"] / "action.yml").read_text(encoding="utf-8"))
            assert set(step.get("with", {})) <= set(action["inputs"]), path


def test_every_input_of_the_action_is_used_and_described() -> None:
    text = ACTIONS[0].read_text(encoding="utf-8")
    action = yaml.safe_load(text)
    assert [name for name in action["inputs"] if f"inputs.{name}" not in text] == []
    assert [name for name, entry in (action["inputs"] | action["outputs"]).items() if not entry["description"]] == []


@pytest.mark.parametrize(
    ("code", "passed", "ends", "says"),
    [
        ("0", "true", 0, "the run passed"),
        ("0", "", 0, "::warning::the run ended, and its report is not judged"),
        ("3", "false", 3, "::error::the report says that something does not match"),
        ("1", "false", 1, "::error::the run failed with exit code 1"),
        ("", "", 1, "::error::the run failed with exit code "),
    ],
)
def test_the_actions_verdict_is_the_runs(code: str, passed: str, ends: int, says: str) -> None:
    (step,) = [step for step in steps_of(ACTIONS[0]) if step.get("name") == "Give the verdict"]
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(shell, env={"CODE": code, "PASSED": passed}, capture_output=True, text=True, check=False, timeout=10)
    assert (done.returncode, done.stdout.startswith(says)) == (ends, True)
    assert set(step["env"]) == {"CODE", "PASSED"}


@pytest.mark.parametrize(("code", "kept"), [("0", "k"), ("3", "k"), ("1", "k-7-2"), ("", "k-7-2")])
def test_what_a_failed_run_made_is_kept_under_a_key_that_the_next_one_finds(expressions: ModuleType, code: str, kept: str) -> None:
    steps = {step["name"]: step for step in steps_of(ACTIONS[0])}
    bring, keep = steps["Bring what an earlier run made"], steps["Keep what this run made"]
    assert (bring["uses"], keep["uses"], keep["with"]["path"]) == ("actions/cache/restore@v5", "actions/cache/save@v5", bring["with"]["path"])
    outputs = {
        "key": {"outputs": {"key": "k", "restore-key": "prefix-"}},
        "cache": {"outputs": {"cache-hit": ""}},
        "run": {"outputs": {"code": code}},
    }
    context = {"steps": outputs, "inputs": {"cache": "true"}, "github": {"run_id": 7, "run_attempt": 2}, "failed": True}
    assert expressions.render(keep["with"]["key"], context) == kept
    assert expressions.render(bring["with"]["key"], context) == "k"
    assert expressions.render(bring["with"]["restore-keys"], context).split() == ["k-", "prefix-"]
    assert expressions.evaluate(keep["if"], context) is True
    outputs["cache"]["outputs"]["cache-hit"] = "true"
    assert expressions.evaluate(keep["if"], context) is False
    names = list(steps)
    assert names.index("Export, fuse, quantise, build and validate") < names.index("Keep what this run made") < names.index("Give the verdict")


def test_the_step_runner_reads_every_condition(expressions: ModuleType) -> None:
    context = {name: {} for name in ("inputs", "matrix", "needs", "vars", "secrets", "env", "steps", "github", "runner")} | {"failed": False}
    conditions = [step["if"] for _, step in ALL if "if" in step]
    assert len(conditions) >= 4
    for condition in conditions:
        expressions.evaluate(condition.removeprefix("${{").removesuffix("}}"), context)


def job_of(name: str) -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "engines.yml").read_text(encoding="utf-8"))["jobs"][name]
    return job


def runs(job: str, expressions: ModuleType, event: str, runner: str, plan: str = "success") -> bool:
    needs = {"plan": {"result": plan}, "engine": {"result": "failure"}}
    context = {"github": {"event_name": event}, "vars": {"GPU_RUNNER": runner}, "needs": needs, "failed": True}
    condition = job_of(job)["if"]
    assert "!cancelled()" in condition, "without a status function GitHub adds success(), and one failed leg skips the job"
    return bool(expressions.render(condition, context))


@pytest.mark.parametrize(
    ("event", "runner", "gpu"),
    [("pull_request", "[1]", False), ("pull_request", "", False), ("workflow_dispatch", "[1]", True), ("workflow_dispatch", "", False)],
)
def test_a_pull_request_never_reaches_a_runner_of_the_repository(expressions: ModuleType, event: str, runner: str, gpu: bool) -> None:
    assert runs("gpu", expressions, event, runner) is gpu
    assert runs("no-gpu", expressions, event, runner) is not gpu
    context = {"github": {"event_name": event}, "vars": {"ENGINE_RUNNER": "ours"}}
    assert expressions.render(job_of("engine")["runs-on"], context) == ("ubuntu-latest" if event == "pull_request" else "ours")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
@pytest.mark.parametrize(("event", "cancels"), [("pull_request", True), ("push", False), ("workflow_dispatch", False)])
def test_only_a_newer_push_to_a_pull_request_cancels_a_run(expressions: ModuleType, path: Path, event: str, cancels: bool) -> None:
    concurrency = yaml.safe_load(path.read_text(encoding="utf-8"))["concurrency"]
    first, second = ({"github": {"event_name": event, "ref": "refs/heads/main", "run_id": run}} for run in (1, 2))
    groups = [expressions.render(concurrency["group"], context) for context in (first, second)]
    assert expressions.render(concurrency["cancel-in-progress"], first) is cancels
    assert (groups[0] == groups[1]) is cancels  # of one group a third run would drop the second, even without cancelling


def test_a_build_that_failed_leaves_out_its_own_plans_alone(expressions: ModuleType, tmp_path: Path) -> None:
    assert runs("gpu", expressions, "workflow_dispatch", "[1]")
    assert not runs("gpu", expressions, "workflow_dispatch", "[1]", plan="failure")  # no matrix to make
    steps = job_of("gpu")["steps"]
    names = [step.get("name", step.get("uses")) for step in steps]
    asks = names.index("Say whether its plans were built")
    assert steps[asks - 1]["continue-on-error"] is True
    assert all("steps.built.outputs.found == 'true'" in step["if"] for step in steps[asks + 1 :])
    for built in (False, True):
        if built:
            (tmp_path / "manifest.json").touch()
        told = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        environment = {"ART": str(tmp_path), "NAME": "7b-int8"} | {name: str(path) for name, path in told.items()}
        shell = ["bash", "-eo", "pipefail", "-c", steps[asks]["run"]]
        said = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True, timeout=10).stdout
        assert said.startswith("::warning::7b-int8 did not run on the GPU") is not built
        assert told["GITHUB_OUTPUT"].exists() is built
    assert told["GITHUB_OUTPUT"].read_text() == "found=true\n"
