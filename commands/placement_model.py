"""The model that placement measures: an artifact's reference, statistics and forms; and the search of what smooths it, a step of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from artifact.calibration import calibration_file
from artifact.config import LlamaConfig
from artifact.graph_file import load_graph
from artifact.layout import layer_of
from artifact.manifest import read_manifest
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, require, run_step

if TYPE_CHECKING:
    from artifact.io_spec import Dtype
    from graphs.quantize.statistics import Statistics
    from validation.forms import SchemeForms
    from validation.reference import Reference


@dataclass(frozen=True)
class Model:
    """An artifact's model, with what its scheme does to the linears of its graph."""

    reference: Reference
    statistics: Statistics
    forms: SchemeForms

    @classmethod
    def open(cls, artifact: Path, scheme: str, graph: str) -> Model:
        """Read what is needed of an artifact; its weights stay on the disk. What smooths it was searched before."""
        from graphs.quantize.smoothing_file import SMOOTHED, read_smoothing
        from validation.forms import FORMS

        reference, statistics, names, dtype = _parts(artifact, scheme, graph)
        found = read_smoothing(artifact, scheme) if scheme in SMOOTHED else {}
        return cls(reference, statistics, FORMS[scheme](reference, statistics, names, dtype, found))


def _parts(artifact: Path, scheme: str, graph: str) -> tuple[Reference, Statistics, list[str], Dtype]:
    """The reference, the statistics, the linears of a graph's layers, and the dtype."""
    from graphs.quantize.linears import find_linears
    from graphs.quantize.statistics import Statistics
    from validation.artifact_weights import artifact_reader
    from validation.reference import Reference

    model = read_manifest(artifact)["model"]
    names = [linear.name for linear in find_linears(load_graph(require(artifact, graph)).graph) if layer_of(linear.name) is not None]
    reference, statistics = Reference(LlamaConfig(**model["config"]), artifact_reader(artifact)), Statistics(artifact / calibration_file(scheme))
    return reference, statistics, names, model["dtype"]


def smooth(artifact: Path, scheme: str, graph: str, *, force: bool = False, progress: Progress = silent) -> Outcome:
    """Search what moves outliers from inputs into weights, for the schemes that do."""

    def work(step: StepContext) -> Report:
        from graphs.quantize.smoothing_file import write_smoothing
        from validation.forms import search_sites

        reference, statistics, names, _ = _parts(artifact, scheme, graph)
        return write_smoothing(step, scheme, search_sites(reference, statistics, names, step.progress))

    inputs = (calibration_file(scheme), graph)
    return run_step(artifact, f"smoothing-{scheme}", {"scheme": scheme}, work, inputs=inputs, force=force, progress=progress)
