"""Load a graph of an artifact; a damaged one is an error that names the command that makes it again."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from artifact.errors import ArtifactError
from artifact.step_kinds import MADE_BY


def load_graph(path: Path) -> ir.Model:
    """Read an ONNX file; weights stay where they are.

    Raises:
        ArtifactError: it is no ONNX file, or cut off.
    """
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx-ir raise classes of their own, without a common base
        made_by = MADE_BY.get(path.name, MADE_BY["traced.onnx"]).format(artifact=path.parent)
        raise ArtifactError(f"{path} is not a readable ONNX file: {type(error).__name__}: {error}", hint=f"{made_by} --force") from error
