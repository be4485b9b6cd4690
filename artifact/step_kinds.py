"""The steps as data: what each reads, what decides its result, and which command makes a file.

Five are commands; `calibrate` is done by `quantize` where a scheme uses what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from artifact.calibration import CALIBRATION, STATIC, calibration_file
from artifact.given import GIVEN_FILE

CHECKSUMS = "weights/checksums.json"


@dataclass(frozen=True)
class Step:
    """What a kind of step reads, and what decides its result.

    Attributes:
        inputs: glob patterns in the artifact folder; the first must match.
        rules: glob patterns of source files, from the project's root.
        packages: distributions whose versions matter.
        judges: takes inputs that were changed by hand, because saying so is its work.
    """

    inputs: tuple[str, ...]
    rules: tuple[str, ...]
    packages: tuple[str, ...]
    judges: bool = False


SHARED = ("artifact/*.py",)
"""What every step imports."""

_MEASURED = (
    "graphs/quantize/statistics.py",
    "exporter/checkpoints/file_tensor.py",
    "validation/calibration*.py",
    "validation/artifact_weights.py",
    "validation/reference.py",
    "validation/text.py",
    "validation/texts/calibration.jsonl",
    "exporter/model.py",
    "exporter/rope.py",
)
"""What activations are measured with."""
_SMOOTHED = (
    "commands/placement_model.py",
    "graphs/fusions/_*.py",
    "graphs/quantize/int8.py",
    "graphs/quantize/islands.py",
    "graphs/quantize/linears.py",
    "graphs/quantize/rounding.py",
    "graphs/quantize/smoothing*.py",
    "graphs/rewriting.py",
    "validation/forms.py",
)
"""What outliers are moved by."""
_QUANTISED = (
    "graphs/quantize/*.py",
    "graphs/fusions/_*.py",
    "graphs/rewriting.py",
    "commands/placement*.py",
    "validation/bootstrap.py",
    "validation/fake_quant.py",
    "validation/forms.py",
    "validation/joint_cost.py",
    "validation/metrics.py",
    "validation/perplexity.py",
    "validation/placement_text.py",
    "validation/quality.py",
    "validation/rounded_once.py",
    "validation/scoring.py",
    "validation/sensitivity.py",
)
"""What decides how weights are rounded, and which."""
_PARTED = ("commands/part_graphs.py", "graphs/diff.py", "graphs/partition.py", "graphs/parts.py")
"""What an engine graph is cut into parts by."""
_RUN_ON_GPU = (
    "engines/backends/flags.py",
    "engines/checks.py",
    "engines/decode_gemv.py",
    "engines/device*.py",
    "engines/engine_graph.py",
    "engines/graph_weights.py",
    "engines/one_position.py",
    "engines/plan*.py",
    "engines/runnable.py",
    "engines/runner.py",
    "engines/static_checks.py",
)
"""What runs plans, and says what an engine graph must be."""

STEPS: Mapping[str, Step] = {
    "export": Step((), ("exporter/**/*.py", *SHARED), ("torch", "onnx", "onnx-ir", "onnxscript", "gguf", "safetensors", "tokenizers")),
    "fuse": Step(
        ("traced.onnx",),
        ("graphs/fusions/*.py", "graphs/lowering/*.py", "graphs/*.py", "engines/one_position.py", *SHARED),
        ("onnx-ir", "onnxscript"),
    ),
    "calibrate": Step(
        (CHECKSUMS, "config.json", "tokenizer.json"),
        (*_MEASURED, *SHARED),
        ("torch", "numpy", "tokenizers"),
    ),
    "smoothing": Step((CHECKSUMS, "config.json"), (*_MEASURED, *_SMOOTHED, *SHARED), ("torch", "numpy")),
    "sensitivity": Step((CHECKSUMS, "config.json", "tokenizer.json"), (*_MEASURED, *_QUANTISED, *SHARED), ("torch", "numpy", "tokenizers")),
    "quantize": Step(
        (CHECKSUMS, GIVEN_FILE),
        (*_QUANTISED, *_MEASURED, "engines/one_position.py", "validation/texts/default.txt", *SHARED),
        ("onnx-ir", "numpy", "torch", "tokenizers", "safetensors"),
    ),
    "build": Step((), ("engines/**/*.py", *_PARTED, *SHARED), ("onnx-ir", "polygraphy", "tensorrt-rtx-cu12", "tensorrt")),
    "validate": Step(
        ("traced.onnx", "*.onnx", "weights/*", "tokenizer*", "engines/*/build.json", "sensitivity-*.json"),
        (
            "validation/**/*.py",
            "validation/**/*.j2",
            "validation/texts/*",
            "exporter/**/*.py",
            *_RUN_ON_GPU,
            "engines/edge_calls.py",
            "engines/profiles.py",
            "graphs/diff.py",
            "graphs/fusions/_*.py",
            "graphs/joined.py",
            "graphs/partition.py",
            *(f"graphs/quantize/{file}.py" for file in ("gptq", "linears", "placement", "rounding", "scaling")),
            "graphs/rewriting.py",
            "artifact/*.py",
        ),
        ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "onnx-ir", "numpy", "tokenizers"),
        judges=True,
    ),
}
"""Step name → what it depends on. A step id is a name, or a name and a variant: `quantize-int8`, `fuse-onnxruntime`, `build-a100-80gb-fp16`."""

_QUANTIZE = "python cli.py quantize {artifact} --scheme "
_BUILT_AS = {"fused": "fp16", "traced": "fp32"} | {one: one for one in ("int8", "int8-smoothquant", "int4")}
_WHOLE_OR_ONE = ("", "-engine")
MADE_BY = {
    **dict.fromkeys(("traced.onnx", CHECKSUMS), "python cli.py export --checkpoint SRC --out {artifact}"),
    "fused.onnx": "python cli.py fuse {artifact}",
    **{f"fused-onnxruntime{end}.onnx": "python cli.py fuse {artifact} --target onnxruntime" for end in _WHOLE_OR_ONE},
    **{f"{one}.onnx": _QUANTIZE + one for one in ("int8", "int8-smoothquant", "int4")},
    **{f"{one}-onnxruntime{end}.onnx": f"{_QUANTIZE}{one} --target onnxruntime" for one in ("int8", "int4") for end in _WHOLE_OR_ONE},
    **{f"{stage}-engine.onnx": f"python cli.py build {{artifact}} --precision {one}" for stage, one in _BUILT_AS.items()},
    "fused-engine-gemv.onnx": "python cli.py build {artifact} --decode-gemv",
    CALIBRATION: "python cli.py quantize {artifact}",
    **{calibration_file(one): _QUANTIZE + one for one in STATIC},
    "smoothing-int8-smoothquant.npz": f"{_QUANTIZE}int8-smoothquant",
    **{f"scores-{one}.json": _QUANTIZE + one for one in ("int8", "int8-smoothquant")},
}
"""File → the command that makes it."""
