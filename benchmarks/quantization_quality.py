"""What each form of INT8 and INT4 costs SmolLM2-135M, ours and other tools', on the same tokens in one run. Writes docs/quantization.md.

    python benchmarks/quantization_quality.py [--tokens 16896] [--folder DIR] [--only ROW …]

Three texts that nothing was calibrated on (quality_texts.py), in windows of 512 tokens; every figure is against the float32 reference on the same
tokens: perplexity's increase, KL and top-1, ± standard errors of blocks of 32 tokens drawn again. Graphs run whole in ONNX Runtime on the CPU with
Q/DQ as written; the curve and naive INT8 run in PyTorch, with weights and inputs rounded as the graph rounds them. Whatever has static scales for
activations calibrates on the same 24,576 tokens; weight-only schemes on 8,192. A row that is measured is kept in the folder: run again,
and it goes on where it was; only what has changed is measured anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from quality_document import document
from quality_ours import Curve, graph_identity
from quality_peers import MODELOPT, VERSIONS, by_modelopt, by_onnxruntime, fold_constants
from quality_rows import WINDOW, Rows, Yardstick, make_yardstick
from shapes import ROOT

from artifact.calibration import STATIC_TOKENS
from artifact.config import LlamaConfig
from artifact.manifest import read_manifest
from validation.calibration_text import load_sequences
from validation.graph_runner import GraphRunner
from validation.perplexity import TokenScores

DOCUMENT = ROOT / "docs" / "quantization.md"
SMOOTHQUANT = "int8-smoothquant"
SHARES = (100, 90, 85, 80, 75, 50)
"""Per cent of the layers' linear weights that multiply integers: the curve. 0 % is int8."""
GROUPS = ("ours", "plain", "modelopt", "onnxruntime", "naive", "curve")


@dataclass(frozen=True)
class Row:
    """One line of a table: its name, what it was made of, and what measures it."""

    name: str
    identity: str
    measure: Callable[[], TokenScores]


def main() -> None:
    """Measure all rows, print as it goes, and write the document when all are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=33 * WINDOW, help="of all texts together; a multiple of 1,536")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "quantization-quality", help="where some gigabytes fit; kept")
    parser.add_argument("--only", nargs="*", default=GROUPS, choices=GROUPS, help="measure these alone, and write no document")
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    bench = Bench(options.folder.resolve(), options.tokens)
    rows = Rows(options.folder / "rows", bench.yardstick.identity)
    reference = rows.get("float32", "", bench.yardstick.measure)
    judge, table = bench.yardstick.judge(reference), {}
    for group in options.only:
        for row in getattr(bench, group)():
            table[row.name] = judge.describe(rows.get(row.name, row.identity, row.measure))
            found = table[row.name]["all"]
            numbers = f"{found['perplexity_increase_pct']:+.2f} ± {found['perplexity_se_pct']:.2f} %, KL {found['mean_kl']:.4f}"
            sys.stderr.write(f"{row.name}: {numbers}\n")
    if tuple(options.only) == GROUPS:
        versions = VERSIONS | {"ModelOpt": MODELOPT.split("==")[1]}
        text = document(table, (options.tokens, STATIC_TOKENS), bench.placed(), bench.curve_sets.sizes(SHARES), versions)
        options.out.write_text(text, encoding="utf-8")


class Bench:
    """The rows, by group; nothing is made before it is asked for.

    Args:
        folder: where artifacts, other tools' graphs and rows lie.
        tokens: that are scored.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder, self.artifact, self.w8a8, self._tokens = folder, folder / "fp16", folder / "w8a8", tokens
        for artifact in (self.artifact, self.w8a8):
            cli(f"export --checkpoint demo --out {artifact}", f"fuse {artifact}")
        self._config = LlamaConfig(**read_manifest(self.artifact)["model"]["config"])

    @cached_property
    def yardstick(self) -> Yardstick:
        """The tokens."""
        return make_yardstick(self.artifact, self._tokens)

    @cached_property
    def curve_sets(self) -> Curve:
        """Sets of linears by what each was measured to cost."""
        self._place()
        return Curve(self.w8a8, self.yardstick)

    def ours(self) -> Iterator[Row]:
        """What the commands make with their defaults."""
        yield self._graph("float16", self.artifact / "fused.onnx")
        for scheme in ("int8", "int4"):
            cli(f"quantize {self.artifact} --scheme {scheme}")
            yield self._graph(scheme, self.artifact / f"{scheme}.onnx")
        self._place()
        yield self._graph(SMOOTHQUANT, self.w8a8 / f"{SMOOTHQUANT}.onnx")

    def plain(self) -> Iterator[Row]:
        """The weight-only schemes rounded to the nearest level, in the same blocks."""
        artifact = self.folder / "plain"
        cli(f"export --checkpoint demo --out {artifact}", f"fuse {artifact}")
        for scheme in ("int8", "int4"):
            cli(f"quantize {artifact} --scheme {scheme} --calibration none")
            yield self._graph(f"{scheme}, plain rounding", artifact / f"{scheme}.onnx")

    def modelopt(self) -> Iterator[Row]:
        """ModelOpt's SmoothQuant, fake-quantised by itself."""
        yield Row(
            "ModelOpt INT8_SMOOTHQUANT_CFG",
            f"{MODELOPT}, {STATIC_TOKENS} tokens",
            lambda: by_modelopt(self.artifact, self.folder, self._sequences(), self.yardstick),
        )

    def onnxruntime(self) -> Iterator[Row]:
        """Its own quantiser, on a float32 graph."""
        float32 = self.folder / "fp32"
        cli(f"export --checkpoint demo --dtype fp32 --out {float32}", f"fuse {float32}")
        folded = fold_constants(float32 / "fused.onnx", float32 / "folded.onnx")
        for name, make in by_onnxruntime(folded, self.folder, self._config, self._sequences()).items():
            static = f", {STATIC_TOKENS} tokens" if "static" in name else ""
            yield Row(name, VERSIONS["ONNX Runtime"] + static, lambda make=make: self._scores(make(), "fp32"))  # type: ignore[misc]

    def naive(self) -> Iterator[Row]:
        """Every linear in INT8 by INT8, nothing smoothed, nothing left out, weights rounded to the nearest level."""
        yield Row("naive static W8A8", self.curve_sets.calibration, self.curve_sets.naive)

    def curve(self) -> Iterator[Row]:
        """By share of the weights: the cheapest by byte first."""
        for share in SHARES:
            yield Row(f"{share} %", self.curve_sets.identity(share), lambda share=share: self.curve_sets.measure(share))  # type: ignore[misc]

    def placed(self) -> dict[str, Any]:
        """What ``quantize`` chose: its report."""
        self._place()
        report: dict[str, Any] = read_manifest(self.w8a8)["steps"][f"quantize-{SMOOTHQUANT}"]["report"]
        return report

    def _graph(self, name: str, path: Path) -> Row:
        return Row(name, graph_identity(path), lambda: self._scores(path, "fp16"))

    def _scores(self, path: Path, dtype: Any) -> TokenScores:
        runner, windows = GraphRunner(path, self._config, dtype), self.yardstick.windows
        return self.yardstick.measure(lambda index: torch.from_numpy(runner.logits(windows[index].inputs)))

    def _sequences(self) -> list[Any]:
        """What ``_place`` calibrates on."""
        return list(load_sequences(self.artifact, self._config, tokens=STATIC_TOKENS).sequences)

    def _place(self) -> None:
        cli(f"quantize {self.w8a8} --scheme {SMOOTHQUANT}")


def cli(*lines: str) -> None:
    """Commands as a user gives them; a second call does only what has changed."""
    for line in lines:
        subprocess.run([sys.executable, str(ROOT / "cli.py"), *line.split(), "--json"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
