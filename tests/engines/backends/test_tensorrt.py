"""engines/backends/tensorrt.py: real workers on a TensorRT that offers what its bindings list and no more (tests/enterprise/tensorrt.py)."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import EngineError
from artifact.journal import Journal
from artifact.manifest import write_manifest
from artifact.progress import silent
from artifact.steps import StepContext
from engines.backends import tensorrt
from engines.backends.flags import BuildFlags
from engines.backends.protocol import AuditRequest, BuildRequest, BuildResult
from engines.backends.tensorrt import TensorRT
from engines.backends.timing_cache import TimingCache
from engines.build import build_engine, choose_backend
from engines.device import Device
from engines.engine_options import EngineOptions
from engines.plan_words import layer_lines
from engines.profiles import make_profiles
from engines.targets import find_target

pytest.importorskip("polygraphy", reason="polygraphy is not installed")
Make = Callable[..., Any]
A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 2**30)
FAKE = Path(__file__).resolve().parents[2] / "enterprise"


def install(patch: pytest.MonkeyPatch, version: str) -> None:
    """Make this a machine with an A100 and a TensorRT of some release."""
    patch.setenv("FAKE_TENSORRT", version)
    patch.setenv("PYTHONPATH", str(FAKE))
    patch.setattr(tensorrt, "find_spec", lambda name: True)
    patch.setattr(tensorrt, "find_device", lambda: A100)
    tensorrt.import_version.cache_clear()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``install`` for one test."""
    yield lambda version: install(monkeypatch, version)
    tensorrt.import_version.cache_clear()


def build(stage: Any, folder: Path, flags: BuildFlags, kv_cache: str = "dynamic") -> tuple[BuildRequest, BuildResult, dict[str, Any]]:
    """A plan, and how it says it was built."""
    length = 128 if kv_cache == "static" else 256
    profiles = tuple(make_profiles(stage.config, "fp16", kv_cache, max_batch=2, max_length=length))
    request = BuildRequest(stage.engine_graph, folder / "part-00.plan", find_target("a100"), profiles, flags)
    return request, TensorRT().build(request, silent), json.loads(request.plan.read_text())


def audit(stage: Any, request: BuildRequest, result: BuildResult) -> dict[str, Any]:
    return TensorRT().audit(AuditRequest(request.plan, request.graph, "fp16", request.profiles, stage.config), result)


@pytest.fixture(scope="module")
def plain(make_stage: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stage, the request of its plan, and the result of building it."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        install(patch, "11.4.0.106")
        stage = make_stage(folder, 1, "fp16")
        request, result, _ = build(stage, folder, BuildFlags(timing_cache="none"))
    tensorrt.import_version.cache_clear()
    return stage, request, result


def test_a_plain_build_leaves_nothing_to_a_default(make_stage: Make, tmp_path: Path, here: Callable[[str], None]) -> None:
    here("10.15.1.29")
    stage = make_stage(tmp_path, 2, "fp16")
    request, result, plan = build(stage, tmp_path, BuildFlags(timing_cache="none"))
    assert plan["flags"] == []  # TF32 is off, and nothing else is on
    assert (plan["verbosity"], plan["hardware"], plan["pools"], plan["level"]) == ("DETAILED", "NONE", {}, None)
    assert plan["profiles"] == [{name: [list(one) for one in shapes] for name, shapes in profile.shapes.items()} for profile in request.profiles]
    assert (result.version, result.compiler["gpu"]) == ("10.15.1.29", A100.name)
    assert result.compiler["timing_cache"] == {"file": None, "state": None}
    report = audit(stage, request, result)
    assert report["audit"]["passed"] is True
    shown = {line["check"]: line for line in report["audit"]["checks"]}
    assert (shown["fused_attention_prefill"]["value"], shown["fused_attention_prefill"]["passed"]) == (2, None)
    assert (shown["profiles"]["passed"], shown["shapes_decode"]["passed"]) == (True, True)
    words = [line.content for line in layer_lines(report["kernels_by_layer"]) if line.profile == "decode"]
    assert words[0].count("gemm of unknown type") == 4  # qkv, o, gate·up and down; the inspector of the stand-in names no constant


def without_labels(layers: Any) -> Any:
    return {"Layers": [layer | {"Metadata": ""} for layer in layers["Layers"]]}


def without_one_linear(layers: Any) -> Any:
    linears = [layer for layer in layers["Layers"] if layer["LayerType"] == "gemm" and "[profile 1]" in layer["Name"]]
    return {"Layers": [layer for layer in layers["Layers"] if layer is not linears[0]]}


@pytest.mark.parametrize(
    ("spoil", "unread"),
    [
        (lambda layers: "no JSON", 2), (lambda layers: {}, 2), (lambda layers: {"Layers": ["__myl_Fc_myl0_3"]}, 2),
        (without_labels, 2), (without_one_linear, 1), (lambda layers: layers, 0),
    ],
)  # fmt: skip
def test_an_account_that_is_not_whole_is_no_verdict(plain: Any, spoil: Callable[[Any], Any], unread: int) -> None:
    stage, request, result = plain
    spoiled = replace(result, inspection={**result.inspection, "layers": spoil(result.inspection["layers"])})
    found = audit(stage, request, spoiled)["audit"]
    lines = [line for line in found["checks"] if line["check"].startswith("layers_read")]
    assert [line["check"] for line in lines] == ["layers_read_prefill", "layers_read_decode"]
    assert sum(line["passed"] is None for line in lines) == unread
    assert found["passed"] is (None if unread else True)
    assert all("no verdict" in line["reason"] for line in lines if not line["passed"])
    other = replace(spoiled, inspection={**spoiled.inspection, "outputs": []})
    assert audit(stage, request, other)["audit"]["passed"] is False


def test_the_account_of_layers_is_finished_before_its_plan(make_stage: Make, tmp_path: Path, here: Callable[[str], None]) -> None:
    """A build that breaks off between the two would go on with a plan whose account is lost."""
    here("11.4.0.106")
    stage = make_stage(tmp_path, 1, "int8")
    model = {"name": "tiny", "source": "random", "format": "random", "fingerprint": "0", "dtype": "fp16", "config": asdict(stage.config)}
    write_manifest(tmp_path, {"format": 1, "model": model, "steps": {}})
    journal = Journal.reopen(tmp_path, "build-a100-80gb-int8", {"options": {}}, set())
    options = EngineOptions(precision="int8", target="a100", max_batch=1, backend="tensorrt", flags=BuildFlags(timing_cache="none"))
    report = build_engine(StepContext(tmp_path, journal=journal), options, lambda *_: None)
    folder = "engines/a100-80gb-int8"
    assert list(journal.files) == ["int8-engine.onnx", f"{folder}/part-00.layers.json", f"{folder}/part-00.plan", f"{folder}/build.json"]
    (note,) = report["engines"][0]["notes"]
    assert note.endswith("with 1, TensorRT-RTX, which tensorrt was not measured against, writes every int8 weight out at each step")


def test_every_option_is_a_flag_of_the_builder_and_times_are_kept(make_stage: Make, tmp_path: Path, here: Callable[[str], None]) -> None:
    here("11.4.0.106")
    stage, cache = make_stage(tmp_path, 1, "fp16"), tmp_path / "times" / "kernels.timing"
    flags = BuildFlags(True, True, True, 5, 1 << 30, str(cache))
    _, result, plan = build(stage, tmp_path, flags)
    assert plan["flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"]
    assert (plan["pools"], plan["level"]) == ({"WORKSPACE": 1 << 30}, 5)
    assert result.compiler["refittable"] is True
    assert result.compiler["timing_cache"] == {"file": str(cache), "state": "created"}
    assert json.loads(cache.read_text()) == ["11.4.0.106", [stage.engine_graph.name]]


@pytest.fixture(scope="module")
def builder_config() -> Any:
    """Makes configurations of the stand-in, in this process, under a name that nobody imports."""
    spec = importlib.util.spec_from_file_location("enterprise_tensorrt", FAKE / "tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.IBuilderConfig
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("there", "state", "after"),
    [
        (["11.4.0.106", ["before"]], "used", {"before", "measured", "meanwhile"}),
        (["10.16.1.11", ["before"]], "refused: it is no timing cache of this TensorRT release and GPU", {"measured", "meanwhile"}),
        ("rubbish", "refused: it is no timing cache of this TensorRT release and GPU", {"measured", "meanwhile"}),
        (None, "created", {"measured", "meanwhile"}),
    ],
)
def test_times_are_taken_over_and_merged(builder_config: Any, tmp_path: Path, there: Any, state: str, after: set[str]) -> None:
    path, config = tmp_path / "kernels.timing", builder_config()
    if there:
        path.write_text(json.dumps(there))
    cache = TimingCache(path)
    assert cache.attach(config) == state
    config.get_timing_cache()._times.add("measured")
    path.write_text(json.dumps(["11.4.0.106", ["meanwhile"]]))  # by another build
    cache.save(config)
    assert json.loads(path.read_text()) == ["11.4.0.106", sorted(after)]
    path.write_text("rubbish")
    cache.save(config)
    assert json.loads(path.read_text()) == ["11.4.0.106", sorted(after)]


@pytest.mark.parametrize("there", ["a letter to a friend", json.dumps(["10.16.1.11", ["before"]])])
def test_a_file_that_the_user_named_is_never_overwritten(builder_config: Any, tmp_path: Path, there: str) -> None:
    path, config = tmp_path / "notes.txt", builder_config()
    path.write_text(there)
    with pytest.raises(EngineError, match=r"notes\.txt: it is no timing cache of this TensorRT release and GPU") as caught:
        TimingCache(path, named=True).attach(config)
    assert "name another file, or none" in str(caught.value.hint)
    assert path.read_text() == there
    path.unlink()
    cache = TimingCache(path, named=True)
    assert cache.attach(config) == "created"
    path.write_text(there)  # meanwhile
    assert cache.save(config) == "not saved: it is no timing cache of this TensorRT release and GPU"
    assert path.read_text() == there
    path.unlink()
    assert cache.save(config) is None
    assert json.loads(path.read_text()) == ["11.4.0.106", []]


def test_without_a_file_no_times_are_kept(builder_config: Any) -> None:
    config = builder_config()
    cache = TimingCache(None)
    assert cache.attach(config) is None
    cache.save(config)


def test_a_static_cache_gets_its_lengths_and_its_buffers(make_stage: Make, tmp_path: Path, here: Callable[[str], None]) -> None:
    here("11.1.0.106")
    stage = make_stage(tmp_path, 2, "fp16", kv_cache="static")
    request, result, plan = build(stage, tmp_path, BuildFlags(timing_cache="none"), "static")
    assert result.static_cache == {"attention_by_lengths": 2, "caches_in_place": 4}
    assert len(set(plan["lengths"])) == 1
    report = audit(stage, request, result)
    in_place = next(line for line in report["audit"]["checks"] if line["check"] == "caches_in_place")
    assert (in_place["value"], in_place["passed"]) == (4, True)
    facts = {**result.inspection, "aliases": {}, "profiles": result.inspection["profiles"][:1], "outputs": ["logits"]}
    result.__dict__["inspection"] = facts
    failed = {line["check"] for line in audit(stage, request, result)["audit"]["checks"] if line["passed"] is False}
    assert failed == {"profiles", "caches_in_place", "outputs_missing"}


def test_a_static_cache_is_refused_where_attention_has_no_lengths(make_stage: Make, tmp_path: Path, here: Callable[[str], None]) -> None:
    here("10.16.1.11")
    with pytest.raises(EngineError, match=r"a static cache needs TensorRT 11\.0, .* here is 10\.16\.1\.11"):
        build(make_stage(tmp_path, 1, "fp16", kv_cache="static"), tmp_path, BuildFlags(), "static")


def test_another_gpu_than_the_targets_is_named(
    make_stage: Make, tmp_path: Path, here: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    here("11.4.0.106")
    monkeypatch.setattr(tensorrt, "find_device", lambda: Device("NVIDIA L4", (8, 9), 24 * 2**30))
    with pytest.raises(EngineError, match=r"the GPU that is there, NVIDIA L4 of compute capability 8\.9; a100-80gb has 8\.0") as error:
        build(make_stage(tmp_path, 1, "fp16"), tmp_path, BuildFlags())
    assert "doctor" in str(error.value.hint)
    monkeypatch.setattr(tensorrt, "find_device", lambda: "no NVIDIA driver here: libcuda.so.1: …")
    assert TensorRT().unavailable() == "no NVIDIA driver here: libcuda.so.1: …"


def test_what_is_missing_is_named_exactly(here: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here("9.3.0")
    assert TensorRT().unavailable() == "TensorRT 9.3.0 is too old: 10.15 is the first whose parser takes these graphs"
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file: No such file or directory')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tensorrt.import_version.cache_clear()
    assert "libnvinfer.so.11: cannot open shared object file" in str(TensorRT().unavailable())
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None if name == "tensorrt" else find_spec(name))
    assert TensorRT().unavailable() == "tensorrt not installed"
    with pytest.raises(EngineError, match="this machine can't build engines: tensorrt: tensorrt not installed") as error:
        choose_backend("tensorrt")
    assert "containers/Dockerfile" in str(error.value.hint)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu12 is not installed")
def test_options_that_the_other_backend_lacks_are_refused_by_name() -> None:
    with pytest.raises(EngineError, match="tensorrt-rtx has no --version-compatible and no --optimization-level") as error:
        choose_backend("auto", BuildFlags(version_compatible=True, optimization_level=4))
    assert error.value.hint == "--backend tensorrt has it"


@pytest.mark.parametrize(
    ("flags", "words"), [({"optimization_level": 6}, "--optimization-level must be 0 to 5, got 6"), ({"timing_cache": "/"}, "is a folder")]
)
def test_bad_options_are_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        BuildFlags(**flags)


def test_times_are_kept_by_release_and_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "llama2trt" / "tensorrt-11.4.0.106-NVIDIA-A100-SXM4-80GB.timing"
    assert tensorrt.timing_cache_file(BuildFlags(), "11.4.0.106", "NVIDIA A100-SXM4-80GB") == expected
    assert tensorrt.timing_cache_file(BuildFlags(timing_cache="none"), "11.4.0.106", "any") is None
    assert "tensorrt" not in sys.modules
