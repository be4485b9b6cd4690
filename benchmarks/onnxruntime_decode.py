"""Prefill and decode tokens/s in ONNX Runtime on the CPU: our graphs and the peers', in one process, one runtime, interleaved.

    python benchmarks/onnxruntime_decode.py [--folder DIR] [--environments DIR] [--rounds 7] [--only int4]

Batch 1, 256 tokens of prefill, then 64 decode steps; keys and values are bound in place where the graph allows it, otherwise each step's outputs are
bound as the next one's inputs. Ours come in both forms of `export --kv-cache`. In a round every graph has its turn; a graph's ratio is the median
over the rounds of its tokens/s ÷ those of the best peer (the one with the best median) in the same round, so that whatever else the machine does
falls on both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime_peers import OURS, PEERS, make_ours, make_peer, write_checkpoint

TOOLKIT = "this toolkit"
PREFILL, DECODE, CAPACITY, WARM_STEPS = 256, 64, 384, 4
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """One graph, loaded; batch 1."""

    def __init__(self, graph: Path, *, shares_cache: bool, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._presents = {name: name.replace("past_key_values", "present") for name in self._inputs if name.startswith("past")}
        self._shares_cache = shares_cache

    def reset(self) -> None:
        """An empty cache."""
        self._total, self._binding = 0, self._session.io_binding()
        self._cache = {}
        for name, present in self._presents.items():
            _, heads, _, size = self._inputs[name].shape
            empty = np.zeros((1, heads, CAPACITY if self._shares_cache else 0, size if isinstance(size, int) else 64), TYPES[self._inputs[name].type])
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(empty)
            if self._shares_cache:
                self._binding.bind_ortvalue_input(name, self._cache[name])
                self._binding.bind_ortvalue_output(present, self._cache[name])

    def call(self, ids: Any) -> None:
        """Some new tokens [1, S]."""
        new = ids.shape[1]
        self._total += new
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((1, self._total), np.int64),
            "position_ids": np.arange(self._total - new, self._total)[None],
            "cache_write_indices": np.array([self._total - new]),
            "key_value_lengths": np.array([self._total]),
        }
        for name in given.keys() & self._inputs.keys():
            self._binding.bind_cpu_input(name, given[name])
        self._binding.bind_output("logits")
        if self._shares_cache:
            self._session.run_with_iobinding(self._binding)
            return
        for name, present in self._presents.items():
            self._binding.bind_ortvalue_input(name, self._cache[name])
            self._binding.bind_output(present)
        self._session.run_with_iobinding(self._binding)
        self._cache = dict(zip(self._presents, self._binding.get_outputs()[1:], strict=True))

    def measure(self) -> tuple[float, float]:
        """Prefill and decode tokens/s of one turn."""
        ids = np.random.default_rng(0).integers(0, 49000, (1, PREFILL))
        self.reset()
        start = time.perf_counter()
        self.call(ids)
        prefill, steps = time.perf_counter() - start, []
        for step in range(WARM_STEPS + DECODE):
            start = time.perf_counter()
            self.call(ids[:, step : step + 1])
            steps.append(time.perf_counter() - start)
        return PREFILL / prefill, 1 / statistics.median(steps[WARM_STEPS:])


def main() -> None:
    """Print one table a precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "onnxruntime-decode")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(OURS), help="one precision alone")
    options = parser.parse_args()
    ours = {form: make_ours(options.folder / folder, form) for form, folder in {"dynamic": "artifact", "static": "artifact-static"}.items()}
    checkpoint = write_checkpoint(options.folder / "artifact", options.folder / "checkpoint")
    print(f"ONNX Runtime {ort.__version__}, {options.threads} threads, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds")
    for precision in [options.only] if options.only else OURS:
        files = {f"{TOOLKIT}, {form} cache": (graphs[precision], True) for form, graphs in ours.items()}
        for name, peer in PEERS.items():
            graph = make_peer(name, checkpoint, options.folder, options.environments) if peer.precision == precision else None
            if graph is not None:
                files[name] = (graph, peer.shares_cache)
        _print_table(precision, measure(load_twice(files, options.threads), options.rounds))


def load_twice(files: dict[str, tuple[Path, bool]], threads: int) -> dict[str, list[Decoder]]:
    """Each graph in two sessions, loaded in this order and then backwards: where buffers come to lie moves decode by a quarter."""
    graphs: dict[str, list[Decoder]] = {name: [] for name in files}
    for name in [*files, *reversed(files)]:
        graph, shares_cache = files[name]
        graphs[name].append(Decoder(graph, shares_cache=shares_cache, threads=threads))
    return graphs


def measure(graphs: dict[str, list[Decoder]], rounds: int) -> dict[str, Any]:
    """Name → [rounds, 2] tokens/s, the mean of both sessions; each round begins with another graph, and the first one warms up."""
    turns: dict[str, list[Any]] = {name: [] for name in graphs}
    names = list(graphs)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(np.mean([decoder.measure() for decoder in graphs[name]], axis=0))
    return {name: np.array(turn[1:]) for name, turn in turns.items()}


def _print_table(precision: str, turns: dict[str, Any]) -> None:
    peers = [name for name in turns if not name.startswith(TOOLKIT)]
    print(f"\n{precision:28} {'prefill':>8} {'best':>7} {'decode':>8} {'best':>7}   ratio to the best peer: prefill, decode")
    best = [max(peers, key=lambda name: np.median(turns[name][:, kind])) for kind in (0, 1)] if peers else []
    for name, turn in turns.items():
        middle, top = np.median(turn, axis=0), turn.max(axis=0)
        ratios = [float(np.median(turn[:, kind] / turns[best[kind]][:, kind])) for kind in (0, 1)] if peers else []
        print(f"{name:28} {middle[0]:8.0f} {top[0]:7.0f} {middle[1]:8.1f} {top[1]:7.1f}   " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
