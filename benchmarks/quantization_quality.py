"""What each form of INT8 and INT4 costs SmolLM2-135M, ours and other tools', on the same tokens in one run. Writes docs/quantization.md.

    python benchmarks/quantization_quality.py [--tokens 16896] [--folder DIR] [--skip modelopt]

Three texts that nothing was calibrated on (quality_texts.py), in windows of 512 tokens; every figure is against the float32 reference on the same
tokens: perplexity's increase ± its paired standard error, and mean and 99th-percentile KL. Graphs run whole in ONNX Runtime on the CPU with Q/DQ as
written. Every tool calibrates on the same sequences.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality_peers import by_modelopt, by_onnxruntime, fold_constants
from quality_texts import TEXTS
from shapes import ROOT
from tokenizers import Tokenizer

from artifact.config import LlamaConfig
from artifact.layout import PACKED
from artifact.manifest import read_manifest
from artifact.step_kinds import CALIBRATION
from artifact.steps import StepContext
from exporter.checkpoints import open_checkpoint
from graphs.quantize.int8_smoothquant import SCHEME, quantize_int8_smoothquant
from graphs.quantize.smoothing import Smoothing, smooth, unsmoothed
from graphs.quantize.statistics import Statistics
from validation.artifact_weights import artifact_reader
from validation.calibration import READERS
from validation.calibration_text import load_sequences
from validation.graph_runner import GraphRunner
from validation.perplexity import TokenScores, Window, score
from validation.reference import Reference, ReferenceRun

DOCUMENT = ROOT / "docs" / "quantization.md"
WINDOW, PERCENT = 512, 100
CALIBRATION_TOKENS = 12288
SHARES = (0, 25, 50, 75, 80, 90, 100)
"""Per cent of the layers' linear weights that multiply integers: the curve."""
Logits = Callable[[NDArray[np.int64]], NDArray[Any]]
Kept = Mapping[str, str]


@dataclass(frozen=True)
class Yardstick:
    """The tokens, and what the float32 reference says of them."""

    windows: Sequence[Window]
    runs: Sequence[ReferenceRun]
    scores: TokenScores

    def measure(self, logits: Logits) -> TokenScores:
        """Scores of a form of the model."""
        return score(self.windows, lambda index: logits(self.windows[index].inputs), lambda index: self.runs[index].logits())

    def row(self, name: str, scores: TokenScores) -> list[str]:
        """One line of the table; increases of each text apart, too."""
        texts = np.repeat([window.text for window in self.windows], WINDOW)
        by_text = [self._increase(scores, texts == index) for index in range(len(TEXTS))]
        kl = (f"{scores.kl.mean():.4f}", f"{np.quantile(scores.kl, 0.99):.3f}")
        return [name, self._increase(scores, texts >= 0), *kl, *by_text]

    def _increase(self, scores: TokenScores, some: NDArray[np.bool_]) -> str:
        difference = (scores.nll - self.scores.nll)[some]
        ratio = np.exp(difference.mean())
        error = ratio * difference.std(ddof=1) / np.sqrt(len(difference))
        return f"{PERCENT * (ratio - 1):+.2f} ± {PERCENT * error:.2f}"


def main() -> None:
    """Measure all forms, print as it goes, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=33 * WINDOW, help="of all texts together; a multiple of 1,536")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "quantization-quality", help="where some gigabytes fit; kept")
    parser.add_argument("--skip", nargs="*", default=[], choices=["modelopt", "onnxruntime", "curve"])
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    artifact = make_artifact(options.folder / "fp16", "fp16")
    yardstick = make_yardstick(artifact, options.tokens)
    rows, curve = [], []
    for name, scores in forms(artifact, yardstick, options.folder, options.skip):
        (curve if name.endswith("%") else rows).append(yardstick.row(name, scores))
        sys.stderr.write(" | ".join((curve if name.endswith("%") else rows)[-1]) + "\n")
    options.out.write_text(document(rows, curve, options.tokens, float(np.exp(yardstick.scores.nll.mean()))), encoding="utf-8")


def make_artifact(folder: Path, dtype: str) -> Path:
    """The demo model, exported, fused and quantised with the commands that a user has; a second call does only what has changed."""
    calibrated = f"--calibration-tokens {CALIBRATION_TOKENS}"
    commands = [f"export --checkpoint demo --dtype {dtype} --out {folder}", f"fuse {folder}"]
    commands += [f"quantize {folder} --scheme {scheme} {calibrated}" for scheme in ("int8", "int4", SCHEME) if dtype == "fp16"]
    for line in commands:
        subprocess.run([sys.executable, str(ROOT / "cli.py"), *line.split(), "--json"], check=True, stdout=subprocess.DEVNULL)
    return folder


def make_yardstick(artifact: Path, tokens: int) -> Yardstick:
    """Windows of three texts and the reference's run over them."""
    tokenizer, checkpoint, each = Tokenizer.from_file(str(artifact / "tokenizer.json")), open_checkpoint("demo"), tokens // len(TEXTS)
    windows = []
    for index, read in enumerate(TEXTS.values()):
        ids = np.asarray(tokenizer.encode(read(), add_special_tokens=False).ids[: each + 1], np.int64)
        windows += [Window(ids[start : start + WINDOW], ids[start + 1 : start + WINDOW + 1], index) for start in range(0, each, WINDOW)]
    runs = Reference(checkpoint.config, checkpoint.read).run([window.inputs for window in windows], keep_cache=())
    return Yardstick(windows, runs, score(windows, lambda index: runs[index].logits()))


def forms(artifact: Path, yardstick: Yardstick, folder: Path, skip: Sequence[str]) -> Iterator[tuple[str, TokenScores]]:
    """Name and scores of every form, one after the other."""
    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    sequences = load_sequences(artifact, config, tokens=CALIBRATION_TOKENS).sequences

    def graph(path: Path, dtype: Any = "fp16") -> TokenScores:
        return yardstick.measure(GraphRunner(path, config, dtype).logits)

    for stage in ("fused", "int8", "int4", SCHEME):
        if (artifact / f"{stage}.onnx").is_file():
            yield {"fused": "float16"}.get(stage, stage), graph(artifact / f"{stage}.onnx")
    copy = artifact.with_name("forms")
    for name, kept, found in [] if "curve" in skip else variants(artifact, config):
        made = quantized_copy(artifact, copy, kept, found)
        yield name, graph(made)
    if "onnxruntime" not in skip:
        float32 = make_artifact(folder / "fp32", "fp32")
        folded = fold_constants(float32 / "fused.onnx", folder / "folded.onnx")
        for name, path in by_onnxruntime(folded, folder, config, sequences).items():
            yield name, graph(path, "fp32")
    if "modelopt" not in skip:
        full = [ids for ids in sequences if len(ids) == max(map(len, sequences))]
        given = {
            "calibration": np.stack(full),
            "windows": np.stack([np.append(window.inputs, window.targets[-1]) for window in yardstick.windows]),
            "reference": np.stack([run.final_hidden.float().numpy() for run in yardstick.runs]),
        }
        found = by_modelopt(folder / "fp16", folder, given)
        nothing = np.full(len(found["nll"]), np.nan)
        yield "ModelOpt INT8_SMOOTHQUANT_CFG", TokenScores(found["nll"], found["kl"], nothing, nothing)


def variants(artifact: Path, config: LlamaConfig) -> Iterator[tuple[str, Kept, Mapping[str, Smoothing]]]:
    """Naive static W8A8, and the curve: what the search says loses most of its output stays weight-only first."""
    statistics, read = Statistics(artifact / CALIBRATION), artifact_reader(artifact)
    sites = [f"model.layers.{layer}.{site}" for layer in range(config.num_hidden_layers) for site in READERS]
    yield "int8 by int8, nothing smoothed", {}, {site: unsmoothed(statistics.of(site)) for site in sites}
    weights = {site: np.concatenate([read(f"{module}.weight").numpy() for module in modules_of(site)]) for site in sites}
    found = smooth(config, statistics, sites, weights.__getitem__)
    sizes = {site: weight.size for site, weight in weights.items()}
    for share in SHARES:
        yield f"{share} %", keep_worst(found, sizes, share), found


def modules_of(site: str) -> list[str]:
    """The linears that read a site."""
    layer, name = ".".join(site.split(".")[:3]), ".".join(site.split(".")[3:])
    return [f"{layer}.{member}" for member in PACKED.get(name, (name,))]


def keep_worst(found: Mapping[str, Smoothing], sizes: Mapping[str, int], share: int) -> dict[str, str]:
    """The sites with the largest errors, until at most so many per cent of the weights are left to multiply integers, and at least where possible."""
    kept: dict[str, str] = {}
    left = total = sum(sizes.values())
    for site in sorted(found, key=lambda site: found[site].error, reverse=True):
        if left - sizes[site] >= total * share / PERCENT - 1e-9:
            kept[site], left = "the curve", left - sizes[site]
    return kept


def quantized_copy(artifact: Path, copy: Path, kept: Kept, found: Mapping[str, Smoothing]) -> Path:
    """An int8-smoothquant graph beside a copy of the float artifact."""
    if not copy.is_dir():
        shutil.copytree(artifact, copy, ignore=shutil.ignore_patterns("int8*", "int4*", "engines", "reports"))
    quantize_int8_smoothquant(StepContext(copy), Statistics(copy / CALIBRATION), kept=kept, found=found)
    return copy / f"{SCHEME}.onnx"


def document(rows: Sequence[Sequence[str]], curve: Sequence[Sequence[str]], tokens: int, perplexity: float) -> str:
    """The whole file."""
    columns = ["", "perplexity, %", "mean KL", "99 % KL", *(f"{name}, %" for name in TEXTS)]
    head = f"""\
# What quantisation costs

Made by `python benchmarks/quantization_quality.py --tokens {tokens}` on {time.strftime("%d %B %Y")}. SmolLM2-135M, {tokens:,} tokens of three
texts that nothing was calibrated on, windows of {WINDOW}; float32's perplexity is {perplexity:.2f}. Increases are of perplexity over float32, ± one
paired standard error; KL in nats. All tools calibrated on the same {CALIBRATION_TOKENS:,} tokens."""
    middle = """\
## int8-smoothquant by share of the layers' linear weights that multiply integers

The rest is weight-only INT8. What loses most of its output, by the search's own measure, is left out first."""
    return "\n\n".join([head, table(columns, rows), middle, table(columns, curve)]) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


if __name__ == "__main__":
    main()
