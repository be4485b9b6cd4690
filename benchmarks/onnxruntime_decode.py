"""Prefill and decode tokens/s in ONNX Runtime on the CPU: our graphs and the peers', one runtime, interleaved.

    python benchmarks/onnxruntime_decode.py [--folder DIR] [--environments DIR] [--processes 2] [--turns 4] [--only int4]

Batch 1, 256 tokens of prefill, then 64 decode steps; keys and values are bound in place where the graph allows it, otherwise each step's outputs are
bound as the next one's inputs. Ours come in both forms of `export --kv-cache`, with logits of all positions and of one, and as what
`fuse --graph --target onnxruntime` makes of optimum's; of the peers' onnxruntime-genai has that option too.
Where a session's buffers come to lie moves decode by a quarter, and whoever is loaded first or last is slow; so there are several processes, and each
loads the graphs from another one on and lets them take turns. A graph's ratio is the median over the turns of its tokens/s ÷ those of the peer in the
same turn; printed is the mean over the processes ± its standard error. The best peer is the one with the best mean ratio to the first peer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime_peers import ONE, OURS, PEERS, fuse_peer, make_ours, make_peer, write_checkpoint

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
            "last_token_indices": np.array([new - 1]),
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
    parser.add_argument("--processes", type=_positive, default=2, help="so many for each place in the order of loading")
    parser.add_argument("--turns", type=_positive, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(OURS), help="one precision alone")
    options = parser.parse_args()
    ours = {form: make_ours(options.folder / folder, form) for form, folder in {"dynamic": "artifact", "static": "artifact-static"}.items()}
    checkpoint = write_checkpoint(options.folder / "artifact", options.folder / "checkpoint")
    print(f"ONNX Runtime {ort.__version__}, {options.threads} threads, load {os.getloadavg()[0]:.1f}, {options.turns} turns a process")
    for precision in [options.only] if options.only else OURS:
        files = {}
        for form, graphs in ours.items():
            whole, one = graphs[precision]
            files |= {f"{TOOLKIT}, {form} cache": (whole, True), f"{TOOLKIT}, {form} cache, {ONE}": (one, True)}
        for name, peer in PEERS.items():
            graph = make_peer(name, checkpoint, options.folder, options.environments) if peer.precision == precision else None
            if graph is not None:
                files[name] = (graph, peer.shares_cache)
                if not peer.shares_cache:
                    files[f"{TOOLKIT}, {name}"] = (fuse_peer(graph), True)
        _print_table(precision, measure(files, options.threads, options.processes, options.turns))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def measure(files: dict[str, tuple[Path, bool]], threads: int, processes: int, turns: int) -> dict[str, Any]:
    """Name → [processes, turns, 2] tokens/s; each process loads the graphs from another one on, every second time backwards."""
    names = list(files)
    orders = [names[first:] + names[:first] for first in range(len(names))]
    orders = [order[::-1] if (number + at) % 2 else order for number in range(processes) for at, order in enumerate(orders)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        measured = list(pool.map(take_turns, [{name: files[name] for name in order} for order in orders], repeat(threads), repeat(turns)))
    return {name: np.array([of_process[name] for of_process in measured]) for name in names}


def take_turns(files: dict[str, tuple[Path, bool]], threads: int, turns: int) -> dict[str, list[tuple[float, float]]]:
    """In a process of its own: load all graphs, then measure each in turn; the first turn warms up."""
    decoders = {name: Decoder(graph, shares_cache=shares, threads=threads) for name, (graph, shares) in files.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for turn in range(turns + 1):
        for name in list(decoders)[:: -1 if turn % 2 else 1]:
            taken[name].append(decoders[name].measure())
    return {name: found[1:] for name, found in taken.items()}


def _ratio(turns: dict[str, Any], name: str, to: str, kind: int) -> tuple[float, float]:
    """Mean and standard error over the processes; ``kind`` is 0 for prefill, 1 for decode."""
    of_processes = np.median(turns[name][..., kind] / turns[to][..., kind], axis=1)
    return float(of_processes.mean()), float(of_processes.std(ddof=1) / len(of_processes) ** 0.5)


def _print_table(precision: str, turns: dict[str, Any]) -> None:
    peers = [name for name in turns if not name.startswith(TOOLKIT)]
    print(f"\n{precision:42} {'prefill':>8} {'best':>7} {'decode':>8} {'best':>7}   ratio to the best peer: prefill, decode")
    best = [max(peers, key=lambda name: _ratio(turns, name, peers[0], kind)[0]) for kind in (0, 1)] if peers else []
    for name, turn in turns.items():
        flat = turn.reshape(-1, 2)
        middle, top = np.median(flat, axis=0), flat.max(axis=0)
        ratios = ", ".join("{:.3f} ± {:.3f}".format(*_ratio(turns, name, to, kind)) for kind, to in enumerate(best))
        print(f"{name:42} {middle[0]:8.0f} {top[0]:7.0f} {middle[1]:8.1f} {top[1]:7.1f}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
