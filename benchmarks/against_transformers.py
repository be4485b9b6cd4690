"""What `validate --against transformers` takes, by depth: `python benchmarks/against_transformers.py [--folder DIR] [7b 13b] [--layers 2 6]`.

Random weights of real widths, the scenarios and 2,048 tokens of text, everything streamed. The reference and the comparison with it run in a process
of its own, which looks at its anonymous memory every 20 ms: weights that are mapped from files count as files. One line a run: memory while the
reference runs and while transformers does, and the CPU seconds of each layer of transformers; then what a layer more takes, and the whole depth.
Exit code 1 where transformers' part needs more than the limit, or the whole depth would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from parity_memory import LIMIT_MB, anonymous_kb
from shapes import SHAPES, config_of, write_checkpoint

SAMPLE_S = 0.02
REFERENCE, THEIRS = "reference", "transformers"


def main() -> int:
    """Print one line a run, and what the whole depth would take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["7b", "13b"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--checkpoint", type=Path, help="Measure this one in this process, and say what it took.")
    options = parser.parse_args()
    if options.checkpoint is not None:
        print(json.dumps(measure(options.checkpoint)))
        return 0
    worst = 0.0
    for size in options.sizes:
        found = {layers: _run(options.folder, size, layers) for layers in options.layers}
        (shallow, low), (deep, high) = min(found.items()), max(found.items())
        each = {what: (high[what] - low[what]) / max(deep - shallow, 1) for what in (THEIRS, "cpu_s")}
        rest = SHAPES[size][2] - deep
        memory, seconds = (high[what] + each[what] * rest for what in each)
        print(
            f"{size:4} a layer more: {each[THEIRS]:+.1f} MB, {each['cpu_s']:.1f} CPU s; all {SHAPES[size][2]} layers: {memory:.0f} MB, "
            f"÷ {LIMIT_MB} MB: {memory / LIMIT_MB:.2f}; {seconds / 60:.1f} CPU minutes",
            flush=True,
        )
        worst = max(worst, memory, *(one[THEIRS] for one in found.values()))
    return 0 if worst <= LIMIT_MB else 1


def _run(folder: Path, size: str, layers: int) -> dict[str, Any]:
    """One size and depth in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        write_checkpoint(Path(scratch) / "checkpoint", config_of(size, layers))
        write_tokenizer(Path(scratch) / "checkpoint" / "tokenizer.json")
        command = [sys.executable, __file__, "--checkpoint", str(Path(scratch) / "checkpoint")]
        found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    by_layer = " ".join(f"{seconds:.1f}" for seconds in found["layer_cpu_s"])
    print(
        f"{size:4} {layers} layers: anonymous {found[REFERENCE]:5.0f} MB reference, {found[THEIRS]:5.0f} MB transformers, ÷ {LIMIT_MB} MB: "
        f"{found[THEIRS] / LIMIT_MB:.2f}; {found['cpu_s']:.0f} CPU s of transformers (layers {by_layer}), {found['seconds']:.0f} s; "
        f"passed: {found['passed']}, hidden {found['hidden_error']:.1e}, logits {found['max_abs_relative']:.1e}, caches {found['cache_error']:.1e}; "
        f"load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return found


def write_tokenizer(path: Path) -> None:
    """Every word is one token: what is measured is the cost of so many tokens, not their sense."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(1000)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.save(str(path))


def measure(checkpoint_folder: Path) -> dict[str, Any]:
    """Peak anonymous MB of both phases, CPU seconds of transformers' and of each of its layers, and what was found."""
    from artifact.steps import StepContext
    from exporter.checkpoints import open_checkpoint
    from validation.prepare import prepare_oracle
    from validation.transformers_check import check_reference
    from validation.transformers_model import TransformersModel

    marks: list[float] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("transformers, layer"):
            marks.append(time.process_time())

    watch = Watch()
    with tempfile.TemporaryDirectory(dir=checkpoint_folder.parent) as scratch:
        step, checkpoint = StepContext(Path(scratch), progress), open_checkpoint(str(checkpoint_folder))
        checkpoint.write_sidecars(step.write)
        model = TransformersModel(checkpoint)
        oracle = prepare_oracle(step, checkpoint, "fp32", text=None, tokens=None, streamed=True)
        watch.phase = THEIRS
        start, cpu = time.perf_counter(), time.process_time()
        entry = check_reference(step, oracle, model)["entry"]
        end = time.process_time()
        watch.stop()
    layers = [after - before for before, after in pairwise(marks)]
    found = {"cpu_s": end - cpu, "seconds": time.perf_counter() - start, "layer_cpu_s": layers, "passed": entry["passed"]}
    return found | {key: entry[key] for key in ("hidden_error", "max_abs_relative", "cache_error")} | watch.peaks


class Watch:
    """Looks at this process's anonymous memory; ``peaks`` are MB by phase."""

    def __init__(self) -> None:
        self.phase, self.peaks = REFERENCE, {REFERENCE: 0.0, THEIRS: 0.0}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more looks."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            phase = self.phase
            self.peaks[phase] = max(self.peaks[phase], anonymous_kb(os.getpid()) * 1024 / 1e6)


if __name__ == "__main__":
    sys.exit(main())
