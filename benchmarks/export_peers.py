"""Wall seconds and peak memory of a float16 export, ours and those of whichever peers are installed, on one checkpoint in one run.

    python benchmarks/export_peers.py [--python PATH_TO_A_PYTHON_WITH_PEERS] [--sizes 1.1b 3.4b] [--folder DIR]

Each tool is a process of its own, children included, and its output is removed before the next starts. A peer that is absent is named and skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from shapes import BASE, ROOT, SHAPES, config_of, write_checkpoint
from tokenizers import Tokenizer, models

PEERS = {  # name → distribution that must be there, and its command
    "onnxruntime-genai builder": ("onnxruntime-genai", "-m onnxruntime_genai.models.builder -i {source} -o {out} -p fp16 -e cuda -c {out}-cache"),
    "mobius": ("mobius-onnx", "-m mobius build --model {source} {out} --dtype f16"),
    "optimum-onnx": ("optimum-onnx", "-m optimum.commands.optimum_cli export onnx -m {source} --task text-generation-with-past --dtype fp16 {out}"),
}
OURS, OURS_AGAIN = "this toolkit", "this toolkit, trace kept"
INSTALLED = "import sys, importlib.metadata as m; m.version(sys.argv[1])"


def main() -> None:
    """Print one table a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="the Python whose packages hold the peers")
    parser.add_argument("--sizes", nargs="+", default=["1.1b", "3.4b"], choices=list(SHAPES))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    ours = [sys.executable, str(ROOT / "cli.py"), "export", "--checkpoint", "{source}", "--out", "{out}"]
    commands = {OURS: ours, OURS_AGAIN: ours}
    for name, (distribution, line) in PEERS.items():
        if subprocess.run([options.python, "-c", INSTALLED, distribution], capture_output=True, check=False).returncode:
            print(f"skipped: {name} ({distribution} is not installed in {options.python})")
        else:
            commands[name] = [options.python, *line.split()]
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            stored = write_checkpoint(Path(scratch) / "checkpoint", config_of(size))
            write_tokenizer(Path(scratch) / "checkpoint")
            print(f"\n{size}: {stored / 1e9:.2f} GB of float16, load {os.getloadavg()[0]:.1f}")
            os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"  # no trace is kept there yet
            rows = {name: measure(command, Path(scratch)) for name, command in commands.items()}
        _print_table(rows)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of made-up words: some peers won't export without one."""
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(BASE["vocab_size"])}, unk_token="w0"))
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def measure(command: list[str], scratch: Path) -> tuple[float, float, int]:
    """Seconds, peak resident MB of the process and its children together, and exit code."""
    out = scratch / "out"
    os.sync()
    start = time.perf_counter()
    process = psutil.Popen(
        [word.format(source=scratch / "checkpoint", out=out) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak, stop = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process, peak, stop))
    watcher.start()
    code = process.wait()
    os.sync()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    for leftover in (out, Path(f"{out}-cache")):
        shutil.rmtree(leftover, ignore_errors=True)
    return seconds, peak[0], code


def _watch(process: psutil.Popen, peak: list[float], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        try:
            family = [process, *process.children(recursive=True)]
            peak[0] = max(peak[0], sum(member.memory_info().rss for member in family) / 1e6)
        except psutil.Error:
            return


def _print_table(rows: dict[str, tuple[float, float, int]]) -> None:
    peers = {name: row for name, row in rows.items() if name not in (OURS, OURS_AGAIN) and row[2] == 0}
    print(f"{'tool':28} {'seconds':>8} {'peak MB':>8}  exit code")
    for name, (seconds, peak, code) in rows.items():
        print(f"{name:28} {seconds:8.1f} {peak:8.0f}  {code}")
    if peers:
        seconds, peak, _ = rows[OURS]
        fastest, smallest = min(row[0] for row in peers.values()), min(row[1] for row in peers.values())
        print(f"time ÷ the fastest peer's {seconds / fastest:.2f}, memory ÷ the smallest peer's {peak / smallest:.2f}")


if __name__ == "__main__":
    main()
