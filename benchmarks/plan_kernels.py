"""Kernels per decoder layer in A100 plans: unfused, fused, fused and packed; and what each plan costs. Writes docs/kernels.md.

    python -m benchmarks.plan_kernels [--models smollm2 7b 70b] [--folder DIR]

SmolLM2 is the real model; of 7B and 70B two layers of their widths are built, with random weights and a vocabulary of 4,096 (a layer is the same at
any depth; the second one is counted, because the first also looks the rotary tables up). Every plan has two profiles, 4 rows, 2,048 tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.graph_file import load_graph
from artifact.manifest import read_manifest
from artifact.progress import silent
from benchmarks.shapes import ROOT, config_of
from engines.backends.protocol import BuildRequest, BuildResult
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.engine_graph import write_engine_graph
from engines.graph_weights import weights_bytes
from engines.plan_layers import Launch, PlanReader, describe
from engines.plan_program import read_programs
from engines.profiles import make_profiles
from engines.targets import find_target
from graphs.pipeline import fuse_model

DOCUMENT = ROOT / "docs" / "kernels.md"
PACKED, GEMV = "fused and packed", "the same with --decode-gemv"
FORMS = {"unfused": "traced", "fused": "unpacked", PACKED: "fused", GEMV: "fused", "INT8, fused and packed": "int8"}
"""Form → the graph it is built from; ``unpacked`` is made here, by the same fusions without the two that pack."""
MODELS = {"smollm2": "SmolLM2-135M (30 layers)", "7b": "7B widths (2 layers)", "70b": "70B widths (2 layers)"}
VOCABULARY, MAX_BATCH, MAX_LENGTH = 4096, 4, 2048
PROFILES = ("prefill", "decode")
MEGABYTE = 10**6
INTRODUCTION = f"""\
Made by `python -m benchmarks.plan_kernels` with TensorRT-RTX {{version}} for compute capability 8.0 (A100), without a GPU: kernels are read from the
plans, not timed. Two profiles, up to {MAX_BATCH} rows and {MAX_LENGTH:,} tokens. 7B and 70B are two layers of their widths, with random weights and a
vocabulary of {VOCABULARY:,}. A layer's kernels are those of the layer that most are like.

- *unfused*: `traced.onnx`
- *fused*: the fusions without the two that pack q·k·v and gate·up
- *fused and packed*: `fused.onnx`; INT8 is `int8.onnx`
- *the same with --decode-gemv*: decode's q·k·v and down as sums of products (docs/adr/010); what `build` makes by itself up to 2,048 wide and 4 rows

All are built as engine graphs, with one position a row before lm_head. Seconds and memory are those of one run on a shared machine of two cores."""
COSTS = ["", "form", "network layers", "launches prefill / decode", "plan ÷ weights", "plan MB", "built in s", "CPU s", "anonymous memory MB"]


@dataclass(frozen=True)
class Measured:
    """One plan: its launches by profile, and what it cost."""

    launches: dict[str, list[Launch]]
    weights_bytes: int
    plan_bytes: int
    build: BuildResult
    cpu_s: float

    def layer(self, profile: str) -> list[dict[str, Any]]:
        """The kernels of the layer that most layers are like; of two such, the later."""
        groups = describe(self.launches[profile])["layers"]
        kernels: list[dict[str, Any]] = max(groups, key=lambda group: (group["last"] - group["first"], group["last"]))["kernels"]
        return kernels


def main() -> None:
    """Measure, print as it goes, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where some gigabytes fit")
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    measured = {}
    for model in options.models:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            artifact = make_artifact(model, Path(scratch))
            measured[model] = {form: measure(artifact, stage, gemv=form == GEMV) for form, stage in FORMS.items()}
    options.out.write_text(document(measured), encoding="utf-8")


def make_artifact(model: str, scratch: Path) -> Path:
    """Export, fuse and quantise with the commands that a user has."""
    artifact = scratch / "artifact"
    source = ["--checkpoint", "demo"] if model == "smollm2" else ["--checkpoint", "random", "--config", str(scratch / "config.json")]
    if model != "smollm2":
        (scratch / "config.json").write_text(json.dumps(config_of(model, layers=2) | {"vocab_size": VOCABULARY}))
    for command in (["export", *source, "--out", artifact], ["fuse", artifact], ["quantize", artifact]):
        subprocess.run([sys.executable, ROOT / "cli.py", *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    graph = load_graph(artifact / "traced.onnx")
    fuse_model(graph, config, own_layout=False)
    ir.save(graph, artifact / "unpacked.onnx")
    return artifact


def measure(artifact: Path, stage: str, *, gemv: bool) -> Measured:
    """Build one plan, read it, remove it."""
    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    graph_file, plan = artifact / f"{stage}-engine.onnx", artifact / f"{stage}.plan"
    write_engine_graph(artifact / f"{stage}.onnx", graph_file, decode_gemv=gemv)
    profiles = make_profiles(config, "fp16", max_batch=MAX_BATCH, max_length=MAX_LENGTH, gemv=gemv)
    before = children_cpu_s()
    built = TensorRTRTX().build(BuildRequest(graph_file, plan, find_target("a100"), tuple(profiles)), silent)
    cpu_s = children_cpu_s() - before
    graph = ir.load(graph_file).graph
    reader, programs = PlanReader(graph, config), read_programs(plan)
    launches = {name: reader.launches(program) for name, program in zip(PROFILES, programs, strict=True)}
    result = Measured(launches, weights_bytes(graph), plan.stat().st_size, built, cpu_s)
    plan.unlink()
    unknown = sum(reader.sizes(program).elements(tensor.dims) is None for program in programs for k in program.kernels for tensor in k.writes)
    counts = ", ".join(f"{profile} {len(result.layer(profile))}" for profile in PROFILES)
    sys.stderr.write(f"{artifact.parent.name} {stage}: kernels a layer: {counts}; {cpu_s:.1f} CPU s; {unknown} sizes unknown\n")
    return result


def children_cpu_s() -> float:
    """Seconds that finished children have computed: they hardly depend on what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def document(measured: dict[str, dict[str, Measured]]) -> str:
    """The whole file."""
    version = next(iter(next(iter(measured.values())).values())).build.version
    parts = [
        "# What the plans hold, kernel by kernel",
        INTRODUCTION.format(version=version),
        "## Kernels per layer",
        table(["", *(f"{form}, {profile}" for form in FORMS for profile in PROFILES)], kernel_rows(measured)),
        "## What else a layer writes",
        "Beside the cache itself, in tensors of its length: keys or values *repeated* once for every query head, or *copied* for attention to read.",
        table(["", *(f"{form}, {profile}" for form in FORMS for profile in PROFILES)], waste_rows(measured)),
        "## What the plans cost",
        table(COSTS, cost_rows(measured)),
        "## The layers",
        *listings(measured),
    ]
    return "\n\n".join(parts) + "\n"


def kernel_rows(measured: dict[str, dict[str, Measured]]) -> Iterator[list[str]]:
    """One row a model."""
    for model, forms in measured.items():
        yield [MODELS[model], *(str(len(plan.layer(profile))) for plan in forms.values() for profile in PROFILES)]


def waste_rows(measured: dict[str, dict[str, Measured]]) -> Iterator[list[str]]:
    """One row a model: how many tensors of the cache's length are written beside it."""
    for model, forms in measured.items():
        yield [MODELS[model], *(waste(plan.layer(profile)) for plan in forms.values() for profile in PROFILES)]


def waste(kernels: Sequence[dict[str, Any]]) -> str:
    """`2 repeated`, `1 copied`, or a dash."""
    written = [role.split()[0] for kernel in kernels for role in kernel["writes"] if role.startswith(("repeated", "copied"))]
    return ", ".join(f"{written.count(word)} {word}" for word in dict.fromkeys(written)) or "–"


def cost_rows(measured: dict[str, dict[str, Measured]]) -> Iterator[list[str]]:
    """One row a plan."""
    for model, forms in measured.items():
        for form, plan in forms.items():
            launches = " / ".join(str(len(plan.launches[profile])) for profile in PROFILES)
            size = [f"{plan.plan_bytes / plan.weights_bytes:.3f}", f"{plan.plan_bytes / MEGABYTE:,.0f}"]
            cost = [f"{plan.build.seconds:.1f}", f"{plan.cpu_s:.1f}", f"{plan.build.peak_anonymous_mb:,}"]
            yield [MODELS[model], form, f"{plan.build.network_layers:,}", launches, *size, *cost]


def listings(measured: dict[str, dict[str, Measured]]) -> Iterator[str]:
    """Decode's and prefill's layer of the first model, unfused and as it is built."""
    model, forms = next(iter(measured.items()))
    for form, profiles in (("unfused", PROFILES), (PACKED, PROFILES), (GEMV, PROFILES[1:])):
        for profile in profiles:
            kernels = forms[form].layer(profile)
            rows = [[str(number + 1), kernel["kind"], f"`{kernel['kernel']}`", *_details(kernel)] for number, kernel in enumerate(kernels)]
            yield f"{MODELS[model]}, {form}, {profile}:\n\n{table(['', 'kind', 'kernel', 'weight', 'writes'], rows)}"


def _details(kernel: dict[str, Any]) -> tuple[str, str]:
    return kernel["weight"] or "", ", ".join(kernel["writes"])


def table(columns: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if shutil.disk_usage(tempfile.gettempdir()).free < 20 * 1024 * MEGABYTE:
        sys.stderr.write("less than 20 GB free: 70B widths need them; --folder names another place\n")
    main()
