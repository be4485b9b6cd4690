"""A graph with the contract's inputs and outputs, loaded whole or ready to be run layer by layer."""

from __future__ import annotations

from pathlib import Path

from artifact.config import LlamaConfig
from artifact.io_spec import Dtype, KvCache
from artifact.progress import Progress, silent
from validation.graph_runner import GraphRunner
from validation.streamed_runner import Finished, StreamedRunner

ArtifactGraph = GraphRunner | StreamedRunner


def open_runner(
    graph: Path,
    config: LlamaConfig,
    dtype: Dtype,
    kv_cache: KvCache,
    *,
    streamed: bool,
    one_position: bool = False,
    finished: Finished | None = None,
    progress: Progress = silent,
) -> ArtifactGraph:
    """A graph of an artifact.

    Args:
        graph: the ONNX file.
        config, dtype, kv_cache: the model it must be.
        streamed: whether it is run one layer at a time.
        one_position: whether it is an engine graph.
        finished: what another graph with the same layers has computed, where it is streamed.
        progress: told the layer that is being run.
    """
    if streamed:
        return StreamedRunner(graph, config, dtype, kv_cache, one_position=one_position, finished=finished, progress=progress)
    return GraphRunner(graph, config, dtype, kv_cache, one_position=one_position)
