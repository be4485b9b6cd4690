"""Are the weights there that an artifact's graphs point into? Told by names and sizes, for steps that read none of them."""

from __future__ import annotations

from pathlib import Path

from artifact.errors import ArtifactError
from artifact.manifest import Manifest, export_command
from artifact.tensor_file import CHECKSUMS, read_checksums


def check_weight_files(artifact: Path, manifest: Manifest) -> None:
    """Refuse an artifact whose weights are gone or cut off; one that holds the graph alone has none, and passes.

    Raises:
        ArtifactError: names the file, and the size that it must have.
    """
    if manifest["model"].get("weights") == "none":
        return
    in_place = manifest["model"].get("weights") == "reference"
    hint = "it is the checkpoint's own file: put it back as it was" if in_place else export_command(artifact, manifest["model"])
    if not (artifact / CHECKSUMS).is_file():
        raise ArtifactError(f"{artifact} has no {CHECKSUMS}", hint=hint)
    ends: dict[str, int] = {}
    for tensor in read_checksums(artifact).values():
        ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.offset + tensor.length)
    written = {file: record["size"] for step in manifest["steps"].values() for file, record in step["outputs"].items()}
    for file, end in ends.items():
        path, exact = artifact / file, written.get(file)
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ArtifactError(f"{artifact} has no {file}, which its graphs point into", hint=hint)
        if size != exact and (exact is not None or size < end):
            wanted = f"at least {end:,}" if exact is None else f"{exact:,}"
            raise ArtifactError(f"{path} has {size:,} bytes, and must have {wanted}", hint=hint)
