"""inspect: what a checkpoint, ONNX file, artifact folder or plan holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifact.changed import changed_files
from artifact.config import LlamaConfig
from artifact.errors import ArtifactError, FusionError
from artifact.journal import unfinished_steps
from artifact.layout import MODULE_KEY, layer_of, parameter_count
from artifact.manifest import MANIFEST, fingerprint, kv_cache_of, read_manifest
from artifact.progress import Progress, silent
from artifact.stale import stale_steps
from commands.inspect_engine import describe_engines, inspect_plan
from commands.verify import verify_artifact
from engines.estimate import fits_on

if TYPE_CHECKING:
    import onnx_ir as ir

Report = dict[str, Any]


def inspect(path: str, *, verify: bool = False, progress: Progress = silent) -> Report:
    """Describe whatever ``path`` is.

    Args:
        path: an artifact folder, an ONNX file, a plan, or anything that ``export`` takes as a checkpoint or a size; nothing is downloaded of a
            model on the hub.
        verify: re-hash every file of an artifact and compare its weights with the checkpoint; ``passed`` says whether all is as it was written.
        progress: told what is being hashed.

    Returns:
        path, kind, and what that kind holds.

    Raises:
        ToolkitError: it is none of these, or can't be read.
    """
    found = Path(path)
    if (found / MANIFEST).is_file() or unfinished_steps(found):
        return _artifact(found, verify=verify, progress=progress)
    if verify:
        raise ArtifactError(f"{path} is not an artifact folder: only there are hashes to verify", hint="cli.py inspect ART --verify")
    if found.suffix == ".onnx":
        return _graph(found)
    if found.suffix == ".plan":
        return inspect_plan(found)
    return _checkpoint(path, progress)


def _artifact(folder: Path, *, verify: bool, progress: Progress) -> Report:
    manifest = read_manifest(folder)
    outputs = {file: record for step in manifest["steps"].values() for file, record in step["outputs"].items()}
    fused = manifest["steps"].get("fuse", {}).get("report", {"rules": []})
    report: Report = {
        "path": str(folder),
        "kind": "artifact folder",
        "model": {key: value for key, value in (manifest["model"] or {}).items() if key != "config"},
        "config": (manifest["model"] or {}).get("config", {}),
        "fits": {} if manifest["model"] is None else fits_on(LlamaConfig(**manifest["model"]["config"]), kv_cache_of(manifest["model"])),
        "steps": {
            name: f"{step['seconds']} s, {len(step['outputs'])} files{', deleted since' if 'spent' in step else ''}"
            for name, step in manifest["steps"].items()
        },
        "unfinished": unfinished_steps(folder),
        "stale": [stale.words for stale in stale_steps(folder, manifest).values()],
        "files": {file: record["size"] for file, record in outputs.items()},
        "fusion": {rule["rule"]: f"{rule['fired']} of {rule['expected']}, {len(rule['refused'])} refused" for rule in fused["rules"]},
        "changed": [f"{file} is not the file that {step} wrote" for file, step in changed_files(folder, manifest).items()],
        "engines": describe_engines(folder, manifest),
        "graphs": {path.name: _operators(path) for path in sorted(folder.glob("*.onnx"))},
    }
    return report | verify_artifact(folder, manifest, progress) if verify else report


def _operators(path: Path) -> Report:
    """What one graph of an artifact computes with."""
    from graphs.layers import layer_operators
    from graphs.tensorrt_releases import needed_release

    try:
        model = _load(path)
    except FusionError as error:
        return {"unreadable": str(error)}
    layers, needs = layer_operators(model), needed_release(model.graph)
    return {"nodes": model.graph.num_nodes(), "layer_operators": layers.as_json(), "needs_tensorrt": needs.as_json()}


def _load(path: Path) -> ir.Model:
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception as error:
        raise FusionError(f"{path} is not a readable ONNX file: {type(error).__name__}: {error}") from error


def _graph(path: Path) -> Report:
    from graphs.layers import layer_operators
    from graphs.tensorrt_releases import needed_release

    if not path.is_file():
        raise ArtifactError(f"{path} is not there")
    model = _load(path)
    layers: dict[int | None, Counter[str]] = {}
    for node in model.graph:
        layers.setdefault(layer_of(node.metadata_props.get(MODULE_KEY)), Counter())[node.op_type] += 1
    dtypes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            dtypes[str(value.const_value.dtype)] += value.const_value.nbytes
    return {
        "path": str(path),
        "kind": "ONNX graph",
        "opset": model.opset_imports.get(""),
        "nodes": model.graph.num_nodes(),
        "layers": len(layers.keys() - {None}),
        "operators": dict(Counter(node.op_type for node in model.graph).most_common()),
        "operators_of_layer_0": dict(layers.get(0, Counter()).most_common()),
        "operators_outside_layers": dict(layers.get(None, Counter()).most_common()),
        "inputs": {str(value.name): f"{value.dtype} {value.shape}" for value in model.graph.inputs[:5]},
        "outputs": {str(value.name): f"{value.dtype} {value.shape}" for value in model.graph.outputs[:3]},
        "initializer_bytes": dict(dtypes),
        "layer_operators": layer_operators(model).as_json(),
        "needs_tensorrt": needed_release(model.graph).as_json(),
        "file": fingerprint(path),
    }


def _checkpoint(path: str, progress: Progress) -> Report:
    from commands.published import describe_published
    from exporter.checkpoints import CheckpointRequest, open_request
    from exporter.checkpoints.quantised_model import QuantisedCheckpoint

    if (published := describe_published(path, progress)) is not None:
        return published
    checkpoint = open_request(CheckpointRequest(path), progress=progress)
    config: LlamaConfig = checkpoint.config
    given = checkpoint.given if isinstance(checkpoint, QuantisedCheckpoint) else None
    return {
        "path": path,
        "kind": f"checkpoint ({checkpoint.format})",
        "name": checkpoint.name,
        "parameters": parameter_count(config),
        "tensors": len(checkpoint.shapes),
        "config": {key: value for key, value in config.to_hf().items() if key not in ("architectures",)},
        "fits": fits_on(config),
        **({"quantization": given.as_record() | {"scheme": given.scheme}} if given is not None else {}),
        "dropped": list(checkpoint.dropped),
        "unknown_config_keys": list(checkpoint.unknown_config_keys),
        "notes": list(checkpoint.notes),
        "fingerprint": checkpoint.fingerprint,
    }
