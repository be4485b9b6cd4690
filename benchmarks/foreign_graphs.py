"""Other exporters' graphs of one real checkpoint, fused and judged: the tables of docs/foreign-graphs.md.

    python benchmarks/foreign_graphs.py CHECKPOINT --optimum PYTHON --genai PYTHON [--target T] [--folder DIR] [--tokens 2048] [--only NAME …]

CHECKPOINT is a Hugging Face folder with a tokenizer. PYTHON are interpreters of environments that hold optimum-onnx and onnxruntime-genai; without
one, its rows are left out. What is in --folder already is not exported again; the table shows every row that was ever measured there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OPTIMUM = "-m optimum.commands.optimum_cli export onnx -m {checkpoint} --task text-generation-with-past --dtype {dtype} {out}"
GENAI = "-m onnxruntime_genai.models.builder -i {checkpoint} -o {out} -p {dtype} -e {provider} -c {out}-cache"
DYNAMO = f"{ROOT}/benchmarks/dynamo_llama.py {{checkpoint}} {{out}}/model.onnx --opset {{opset}} --dtype {{dtype}}"
EXPORTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "optimum-fp32": ("optimum", OPTIMUM, {"dtype": "fp32"}),
    "optimum-fp16": ("optimum", OPTIMUM, {"dtype": "fp16"}),
    "dynamo-18-fp32": ("ours", DYNAMO, {"opset": "18", "dtype": "float32"}),
    "dynamo-18-fp16": ("ours", DYNAMO, {"opset": "18", "dtype": "float16"}),
    "dynamo-23-fp32": ("ours", DYNAMO, {"opset": "23", "dtype": "float32"}),
    "dynamo-23-fp16": ("ours", DYNAMO, {"opset": "23", "dtype": "float16"}),
    "genai-fp32": ("genai", GENAI, {"dtype": "fp32", "provider": "cpu"}),
    "genai-fp16": ("genai", GENAI, {"dtype": "fp16", "provider": "cuda"}),
    "genai-int4": ("genai", GENAI, {"dtype": "int4", "provider": "cpu"}),
}
"""Row → whose Python, command, and what it is asked for."""
RULES = {"tensorrt": ("rms_norm", "rotary", "attention"), "onnxruntime": ("rms_norm", "rotary", "group_query_attention", "skip_rms_norm")}
"""Target → the rules that are shown."""


def main() -> None:
    """Export, fuse and judge; each row is kept beside its graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--optimum", help="a Python with optimum-onnx")
    parser.add_argument("--genai", help="a Python with onnxruntime-genai")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "foreign-graphs")
    parser.add_argument("--target", default="tensorrt", choices=list(RULES))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", nargs="+", default=list(EXPORTS), choices=list(EXPORTS))
    options = parser.parse_args()
    pythons = {"ours": sys.executable, "optimum": options.optimum, "genai": options.genai}
    for name in options.only:
        who, command, details = EXPORTS[name]
        if pythons[who] is None:
            print(f"left out: {name} (no --{who})", file=sys.stderr)
            continue
        graph = export(options.folder / name, [pythons[who], *command.split()], details | {"checkpoint": str(options.checkpoint)})
        row = {"graph": name} | measure(graph, options.checkpoint, options.tokens, options.target)
        (graph.parent / f"{options.target}.json").write_text(json.dumps(row, indent=1) + "\n")
        print(line(row, options.target), file=sys.stderr, flush=True)
    files = [options.folder / name / f"{options.target}.json" for name in EXPORTS]
    print_table([json.loads(path.read_text()) for path in files if path.is_file()], options.target)


def export(out: Path, command: list[str], details: dict[str, str]) -> Path:
    """The exporter's graph; its command runs where there is none yet."""
    if not (out / "model.onnx").is_file():
        shutil.rmtree(out, ignore_errors=True)
        command = [word.format(out=out, **details) for word in command]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        shutil.rmtree(f"{out}-cache", ignore_errors=True)
    return out / "model.onnx"


def measure(graph: Path, checkpoint: Path, tokens: int, target: str) -> dict[str, Any]:
    """One row: the fusion, and the verdicts before and after."""
    out = graph.parent / target / "fused.onnx"
    fused, seconds, peak_mb = cli("fuse", "--graph", graph, "--out", out, "--target", target)
    stages = [judge(path, checkpoint, tokens) for path in (graph, out) if path.is_file()]
    stored = sum(path.stat().st_size for path in graph.parent.iterdir() if path.name.startswith("model.onnx"))
    row = {
        "fuse": fused, "fuse_s": seconds, "fuse_peak_mb": peak_mb, "stored_mb": stored / 1e6, "before": stages[0],
        "after": stages[1] if len(stages) > 1 else None, "difference": None,
    }  # fmt: skip
    if len(stages) > 1:
        with ProcessPoolExecutor(1, get_context("spawn")) as other:  # this process stays small: its memory counts as its children's before they exec
            row["difference"] = other.submit(difference, graph, out, checkpoint).result()
    return row


def judge(graph: Path, checkpoint: Path, tokens: int) -> dict[str, Any]:
    """The report of ``validate --graph``."""
    return cli("validate", "--graph", graph, "--checkpoint", checkpoint, "--tokens", tokens)[0]


def cli(*arguments: object) -> tuple[dict[str, Any], float, float]:
    """A command's JSON, its wall seconds, and its peak resident MB (VmHWM)."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # what it says on stderr is for whoever watches
        assert process.stdout is not None
        written = process.stdout.read()
        _, _, usage = os.wait4(process.pid, 0)
    return json.loads(written), time.perf_counter() - start, usage.ru_maxrss / 1e3


def difference(before: Path, after: Path, checkpoint: Path) -> float:
    """Largest |logit after − logit before| of a prefill ÷ the largest |logit|."""
    from exporter.checkpoints import open_checkpoint
    from validation.lone.graph import open_lone_graph
    from validation.lone.runner import LoneRunner

    config = open_checkpoint(str(checkpoint)).config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 256)
    old, new = (LoneRunner(open_lone_graph(path, config, str(checkpoint)), config).logits(ids).astype(np.float32) for path in (before, after))
    return float(np.abs(new - old).max() / np.abs(old).max())


def print_table(rows: list[dict[str, Any]], target: str) -> None:
    """The rows as a Markdown table."""
    heads = ("graph", "opset", "nodes", *RULES[target], "noise ratio", "strict noise ratio", "max abs ÷ largest logit")
    heads += ("after against before", "mean KL", "scenarios", "verdict", "fuse: s", "peak MB", "file MB")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(line(row, target))


def line(row: dict[str, Any], target: str) -> str:
    """One row; ``before → after`` where there is an after."""
    fuse, before, after = row["fuse"], row["before"], row["after"]
    rules = {rule["rule"]: f"{rule['fired']} of {rule['expected']}" for rule in fuse["rules"]}
    numbers = [pair(before, after, key) for key in ("noise_ratio", "strict_noise_ratio", "max_abs_relative")]
    verdicts = [{True: "passed", False: "failed", None: "not judged"}[report["passed"]] for report in (before, after) if report]
    scenarios = " → ".join(report["verdict"].split(": ")[1].split(" scenarios")[0] for report in (before, after) if report)
    nodes = f"{fuse['nodes_before']} → {fuse['nodes_after']}" if after else str(fuse["nodes_before"])
    cells = (
        row["graph"], str(before["graph"]["opset"]), nodes, *(rules.get(rule, "fused already") for rule in RULES[target]), *numbers,
        "–" if row["difference"] is None else f"{row['difference']:.1e}", pair(before, after, "mean_kl"), scenarios, " → ".join(verdicts),
        f"{row['fuse_s']:.1f}", f"{row['fuse_peak_mb']:.0f}", f"{row['stored_mb']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def pair(before: dict[str, Any], after: dict[str, Any] | None, key: str) -> str:
    """``0.774 → 0.786``."""
    values = [report["stages"][0][key] for report in (before, after) if report]
    return " → ".join("–" if value is None else f"{value:.2g}" if abs(value) < 1e-2 else f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
