"""The command line: what a program and a person get, and what bad input gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import cli

RunCli = Callable[..., subprocess.CompletedProcess[str]]
Refused = Callable[..., tuple[str, str]]
Refuse = Callable[[Path, Path], str]
ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["estimate", "run", "export", "fuse", "quantize", "build", "validate", "generate", "bench", "inspect", "doctor"]


@pytest.fixture(scope="session")
def refused(run_cli: RunCli) -> Refused:
    """The error line and the hint line of a command that fails; nothing on stdout, no traceback."""

    def run(*arguments: str | Path, code: int = 1) -> tuple[str, str]:
        result = run_cli(*arguments, code=code)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
        assert lines, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0], lines[1] if len(lines) > 1 else ""

    return run


@pytest.fixture(scope="session")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli) -> Path:
    """A tiny artifact after export, fuse and quantize."""
    out = tmp_path_factory.mktemp("artifact") / "tiny"
    for command in (("export", "--checkpoint", tiny_checkpoint, "--out", out), ("fuse", out), ("quantize", out)):
        run_cli(*command)
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"cli.py {command}" in " ".join(result.output.split())


def test_every_command_is_covered() -> None:
    assert sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback) == sorted(COMMANDS)


def test_doctor_prints_one_json_object(run_cli: RunCli) -> None:
    report = json.loads(run_cli("doctor", "--json").stdout)
    assert report["versions"]["torch"]
    assert {row["state"] for row in report["can"]} <= {"yes", "no", "not asked"}
    assert all(row["hint"] for row in report["can"] if row["state"] != "yes")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("inspect", "70b-chat", "--json"), 0), (("fuse", "nowhere"), 1), (("build",), 2)],
    ids=["done", "failed", "usage"],
)
def test_a_process_ends_as_main_does(arguments: tuple[str, ...], code: int, run_cli: RunCli) -> None:
    """What run_cli leaves out: the interpreter's start, and the exit; 3 is in test_verify_finds_a_changed_byte."""
    process = subprocess.run([sys.executable, ROOT / "cli.py", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    ours = run_cli(*arguments, code=code)
    assert (process.returncode, process.stdout) == (code, ours.stdout)
    said, ours_said = (result.stderr.partition("╭ Error")[1:] if code == 2 else result.stderr for result in (process, ours))  # not the program's name
    assert said == ours_said


def test_usage_error_is_exit_code_two(run_cli: RunCli) -> None:
    assert run_cli("build", code=2).stdout == ""
    assert run_cli("run", "--checkpoint", "demo", "--precision", "fp12", code=2).stdout == ""


@pytest.mark.trace
def test_steps_report_the_contracts_keys_and_resume(artifact: Path, tiny_checkpoint: Path, run_cli: RunCli) -> None:
    export = json.loads(run_cli("export", "--checkpoint", tiny_checkpoint, "--out", artifact, "--json").stdout)
    assert export.keys() >= {"artifact", "nodes", "trace_s", "trace_cached", "weights_s", "weights_bytes", "peak_rss_mb"}
    fuse = json.loads(run_cli("fuse", artifact, "--json").stdout)
    assert fuse.keys() >= {"nodes_before", "nodes_after", "rules"}
    assert {rule["rule"]: (rule["fired"], rule["expected"]) for rule in fuse["rules"]}.items() >= {"rms_norm": (5, 5), "attention": (2, 2)}.items()
    quantize = json.loads(run_cli("quantize", artifact, "--json").stdout)
    assert quantize.keys() >= {"scheme", "linears", "quantized", "kept", "bytes"}
    assert "up to date" in run_cli("quantize", artifact).stdout


@pytest.mark.trace
def test_inspect_describes_each_kind(artifact: Path, tiny_checkpoint: Path, run_cli: RunCli) -> None:
    kinds = {path: json.loads(run_cli("inspect", path, "--json").stdout)["kind"] for path in (artifact, artifact / "fused.onnx", tiny_checkpoint)}
    assert list(kinds.values()) == ["artifact folder", "ONNX graph", "checkpoint (safetensors)"]
    verified = json.loads(run_cli("inspect", artifact, "--verify", "--json").stdout)
    assert verified["passed"] is True
    assert verified["verified"] > 5


@pytest.mark.trace
def test_verify_finds_a_changed_byte(artifact: Path, tmp_path: Path, run_cli: RunCli) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifact, copy], check=True)
    weights = copy / "weights" / "layer-001.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    command = [sys.executable, ROOT / "cli.py", "inspect", copy, "--verify"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 3, result.stderr
    first, *_, last = result.stdout.splitlines()
    assert last.startswith("FAILED: ")
    assert "weights/layer-001.safetensors is not the file that was written and" in last
    assert first == f"{copy}: artifact folder: {last}"
    report = json.loads(run_cli("inspect", copy, "--verify", "--json", code=3).stdout)
    assert report["verified"] == report["checked"] - 1


@pytest.mark.trace
def test_step_before_is_named_when_it_is_missing(tmp_path: Path, tiny_checkpoint: Path, run_cli: RunCli, refused: Refused) -> None:
    out = tmp_path / "art"
    assert "is not an artifact folder" in refused("fuse", out)[0]
    run_cli("export", "--checkpoint", tiny_checkpoint, "--out", out)
    error, hint = refused("quantize", out)
    assert "has no fused.onnx" in error
    assert f"cli.py fuse {out}" in hint
    error, hint = refused("build", out, "--precision", "int8")
    assert "has no int8.onnx" in error
    assert f"cli.py quantize {out}" in hint


@pytest.mark.trace
def test_folder_of_another_checkpoint_is_refused(artifact: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    error, hint = refused("export", "--checkpoint", other, "--out", artifact)
    assert "belongs to another checkpoint" in error
    assert "--out" in hint


@pytest.mark.trace
def test_build_without_tensorrt_says_how_to_install_it(artifact: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    error, hint = refused("build", artifact)
    assert "error: this machine can't build engines" in error
    assert "pip install" in hint
    assert not (artifact / "engines").exists()


@pytest.mark.trace
def test_precision_that_the_artifact_cannot_give_is_refused(artifact: Path, refused: Refused) -> None:
    error, hint = refused("build", artifact, "--precision", "fp32")
    assert "a fp32 engine needs an fp32 artifact" in error
    assert "--dtype fp32" in hint


@pytest.mark.trace
def test_generate_without_a_tokenizer_is_refused(artifact: Path, refused: Refused) -> None:
    assert "has no tokenizer.json" in refused("generate", artifact, "hello")[0]


@pytest.mark.trace
def test_static_cache_is_taken_by_each_step_and_the_other_form_s_options_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, run_cli: RunCli, refused: Refused
) -> None:
    out = tmp_path / "static"
    run_cli("export", "--checkpoint", tiny_checkpoint, "--kv-cache", "static", "--out", out)
    assert json.loads(run_cli("inspect", out, "--json").stdout)["model"]["kv_cache"] == "static"
    graph = json.loads(run_cli("inspect", out / "traced.onnx", "--json").stdout)
    assert graph["opset"] == 24
    assert list(graph["inputs"])[:4] == ["input_ids", "position_ids", "cache_write_indices", "key_value_lengths"]
    assert graph["operators_of_layer_0"]["TensorScatter"] == 2
    run_cli("fuse", out)
    run_cli("quantize", out)
    before = sorted(path.name for path in out.iterdir())
    error, hint = refused("build", out)
    assert "a static cache needs --capacity" in error
    assert hint == "hint: --capacity 96"
    assert "--max-length is for a dynamic cache" in refused("build", out, "--max-length", 64)[0]
    assert "no tokenizer.json" in refused("generate", out, "hello", "--capacity", 40)[0]
    assert sorted(path.name for path in out.iterdir()) == before
    again = json.loads(run_cli("export", "--checkpoint", tiny_checkpoint, "--out", out, "--json").stdout)  # the form is an option like any other
    assert again["weights_bytes"] > 0
    assert json.loads(run_cli("inspect", out, "--json").stdout)["model"]["kv_cache"] == "dynamic"
    run_cli("fuse", out)
    assert "--capacity is for a static cache" in refused("build", out, "--capacity", 64)[0]


@pytest.mark.trace
def test_export_loads_neither_transformers_nor_a_runtime(tiny_checkpoint: Path, tmp_path: Path) -> None:
    names = ("transformers", "onnxruntime", "polygraphy", "tensorrt_rtx", "scipy", "pandas")
    code = f"import sys, cli\ntry:\n    cli.app()\nfinally:\n    print([name for name in {names} if name in sys.modules])"
    command = [sys.executable, "-c", code, "export", "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "art")]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}  # nothing kept: this one traces
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_commands_on_graphs_load_no_torch() -> None:
    """It is a second and 130 MB, in the process that waits for the compiler too."""
    code = "import sys, cli, commands.build, commands.estimate, commands.graphs\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout == "False\n"


def test_another_models_folder_is_never_exported_into(
    tiny_checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    victim = make_checkpoint(tmp_path / "victim", seed=1)
    before = {path.name: path.read_bytes() for path in victim.iterdir()}
    assert "is not empty and not an artifact folder" in refused("export", "--checkpoint", tiny_checkpoint, "--out", victim)[0]
    assert {path.name: path.read_bytes() for path in victim.iterdir()} == before


@pytest.mark.trace
def test_damaged_graph_is_one_error_and_the_command_that_makes_it_again(artifact: Path, tmp_path: Path, refused: Refused) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifact, copy], check=True)
    traced = copy / "traced.onnx"
    traced.write_bytes(traced.read_bytes()[:1000])
    error, hint = refused("fuse", copy)
    assert error.strip().endswith("traced.onnx is not the file that export wrote: it was changed since")
    assert "cli.py export --checkpoint" in hint
    assert f"--out {copy}" in hint


class TestBadCheckpoints:
    """Each gets one error, one hint or none, exit code 1, and leaves no folder."""

    @pytest.fixture
    def refuse(self, refused: Refused) -> Refuse:
        def export(folder: Path, out: Path) -> str:
            error, _ = refused("export", "--checkpoint", folder, "--out", out)
            assert not out.exists()
            return error

        return export

    def test_folder_without_config(self, refuse: Refuse, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "config.json" in refuse(tmp_path / "empty", tmp_path / "out")

    def test_other_model_type(self, refuse: Refuse, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path / "c")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "foobar"}))
        error = refuse(folder, tmp_path / "out")
        assert "'foobar'" in error
        assert "'llama'" in error

    def test_missing_tensor(self, refuse: Refuse, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path / "c")
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors")
        assert "model.layers.1.mlp.up_proj.weight" in refuse(folder, tmp_path / "out")

    def test_extra_tensor(self, refuse: Refuse, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path / "c")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.router.weight"] = tensors["model.norm.weight"].clone()
        save_file(tensors, folder / "model.safetensors")
        assert "model.layers.1.mlp.router.weight" in refuse(folder, tmp_path / "out")

    @pytest.mark.parametrize("layers", [1, 3])
    def test_other_number_of_layers(self, refuse: Refuse, make_checkpoint: Callable[..., Path], tmp_path: Path, layers: int) -> None:
        folder = make_checkpoint(tmp_path / "c")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        error = refuse(folder, tmp_path / "out")
        assert f"{layers} layers" in error or f"{layers} layer" in error
        assert "2" in error

    def test_truncated_file(self, refuse: Refuse, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path / "c")
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[:-100])
        error = refuse(folder, tmp_path / "out")
        assert "model.safetensors" in error
        assert str(len(raw)) in error.replace(",", "")

    def test_shape_that_disagrees_with_the_config(self, refuse: Refuse, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path / "c")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
        error = refuse(folder, tmp_path / "out")
        assert "mlp.gate_proj.weight" in error
        assert "40" in error
        assert "48" in error
