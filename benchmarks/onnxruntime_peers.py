"""Decoder graphs of SmolLM2-135M for ONNX Runtime: this toolkit's, and those of peers, made by their own tools in virtual environments."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file, save_file
from shapes import ROOT

ONE = "one position"
GENAI = ("torch", "onnxruntime-genai==0.18.0", "mobius-onnx==0.1.0", "onnxruntime", "transformers", "onnx", "onnx-ir")
OPTIMUM = ("torch", "optimum-onnx==0.1.0", "onnxruntime", "onnx")


@dataclass(frozen=True)
class Peer:
    """One graph of another tool.

    Attributes:
        precision: the group it is compared in.
        packages: what its environment holds.
        command: arguments of that environment's Python.
        shares_cache: whether past and present may be one buffer.
    """

    precision: str
    packages: tuple[str, ...]
    command: str
    shares_cache: bool = True


BUILDER = "-m onnxruntime_genai.models.builder -i {source} -o {out} -e cpu -c {out}-cache -p "
PRUNED = " --extra_options prune_lm_head=true"
"""The builder's option for logits of one position a row."""
BITS = {"float32": "fp32", "int8": "int8", "int4": "int4"}
PEERS = {
    **{f"onnxruntime-genai {bits}": Peer(precision, GENAI, BUILDER + bits) for precision, bits in BITS.items()},
    **{f"onnxruntime-genai {bits}, {ONE}": Peer(precision, GENAI, BUILDER + bits + PRUNED) for precision, bits in BITS.items()},
    "mobius fp32": Peer("float32", GENAI, "-m mobius build --model {source} {out} --dtype f32 --ep cpu"),
    "optimum-onnx fp32": Peer(
        "float32", OPTIMUM, "-m optimum.commands.optimum_cli export onnx -m {source} --task text-generation-with-past {out}", shares_cache=False
    ),
}
OURS = {"float32": "fused-onnxruntime", "int8": "int8-onnxruntime", "int4": "int4-onnxruntime"}


def make_ours(artifact: Path, kv_cache: str = "dynamic") -> dict[str, tuple[Path, Path]]:
    """Precision → our graph, and the one that gives logits of one position a row; a second call does only what has changed."""
    steps = ("fuse {artifact}", "quantize {artifact} --scheme int8", "quantize {artifact} --scheme int4")
    _cli(f"export --checkpoint demo --dtype fp32 --kv-cache {kv_cache} --out {artifact}")
    for step in steps:
        _cli(step.format(artifact=artifact) + " --target onnxruntime")
    return {precision: (artifact / f"{stage}.onnx", artifact / f"{stage}-engine.onnx") for precision, stage in OURS.items()}


def fuse_peer(graph: Path) -> Path:
    """A peer's graph in this toolkit's operators for ONNX Runtime, in a folder beside it."""
    out = graph.parent.with_name(f"{graph.parent.name}-fused") / "fused.onnx"
    _cli(f"fuse --graph {graph} --out {out} --target onnxruntime")
    return out


def write_checkpoint(artifact: Path, folder: Path) -> Path:
    """The artifact's weights as the one Hugging Face folder that peers read."""
    if not (folder / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for file in sorted(artifact.glob("weights/*.safetensors")):
            if "onnxruntime" not in file.name:
                tensors |= {name: tensor for name, tensor in load_file(file).items() if "rotary_emb" not in name}
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(artifact / name, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_peer(name: str, checkpoint: Path, folder: Path, environments: Path) -> Path | None:
    """A peer's graph; None, with the reason printed, where its tool can't be installed or fails."""
    peer, out = PEERS[name], folder / name.replace(",", "").replace(" ", "-")
    if (out / "model.onnx").is_file():
        return out / "model.onnx"
    try:
        python = _environment(environments / ("optimum" if peer.packages is OPTIMUM else "genai"), peer.packages)
        command = [word.format(source=checkpoint, out=out) for word in peer.command.split()]
        subprocess.run([str(python), *command], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        print(f"skipped: {name}: {error.stderr.strip().splitlines()[-1:]}")
        return None
    return out / "model.onnx"


def _environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """The Python of a virtual environment with these packages; CPU wheels of torch where the index has them."""
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, text=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, capture_output=True, text=True)
        stamp.touch()
    return python


def _cli(line: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *line.split(), "--json"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
