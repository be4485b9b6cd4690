"""The report of a validation that needs no checkpoint: what is judged or compared, of the same keys as a parity report, without what only one has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from artifact.config import LlamaConfig
from artifact.hashing import sha256_of
from artifact.io_spec import KvCache
from artifact.layout import parameter_count
from artifact.manifest import Manifest, atomic_write, kv_cache_of
from artifact.progress import Progress
from validation import machine, tolerances
from validation.checksums import verify_checksums
from validation.finite import without_nonfinite
from validation.lone.report import REPORTS, reports_folder
from validation.render import render_all, schema
from validation.residency import WHOLE, Residency, choose_residency
from validation.side import Side, file_side, stage_side
from validation.stage_choice import choose_stages

Report = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is judged or compared: the stages of an artifact, or one file.

    Attributes:
        folder: where its reports go, one folder further in.
        model: the report's ``model``.
        not_run: what is there and is not run, with the reason.
        about: the report's keys that are of it alone.
    """

    name: str
    folder: Path
    model: Report
    sides: list[Side]
    not_run: list[Report]
    about: Report
    manifest: Manifest | None = None
    residency: Residency = WHOLE
    started: float = field(default_factory=time.perf_counter)

    @property
    def streamed(self) -> bool:
        """Whether its graphs are run one layer at a time."""
        return self.residency.streamed


def artifact_subject(artifact: Path, manifest: Manifest, stages: list[str] | None, *, streamed: bool | None, progress: Progress) -> Subject:
    """The stages of an artifact, its stored bytes checked first; ``manifest`` is the artifact's.

    Raises:
        ValidationError: a stage that is not there.
    """
    started, model = time.perf_counter(), manifest["model"]
    chosen, left_out = choose_stages(artifact, stages, model["dtype"])
    stored, config = verify_checksums(artifact, manifest, progress), LlamaConfig(**model["config"])
    residency = choose_residency(config, streamed)
    cache: KvCache = kv_cache_of(model)
    about = {
        "cache": {"form": cache, "capacity": None},
        "execution": residency.as_report() | {"resumed": []},
        "checksums": stored.as_report(),
        "hashes": {f"{stage}.onnx": sha256_of(artifact / f"{stage}.onnx") for stage in chosen},
    }
    described = {**model, "parameters": parameter_count(config)}
    sides = [stage_side(artifact, manifest, stage) for stage in chosen]
    return Subject(artifact.name, artifact / REPORTS, described, sides, left_out, about, manifest, residency, started)


def file_subject(graph: Path, config: LlamaConfig, model: Report, progress: Progress) -> Subject:
    """Any decoder's ONNX file; ``model`` has name, source, format and fingerprint of what it is a graph of. Raises as ``open_lone_graph``."""
    side = file_side(graph, config, str(model["name"]))
    assert side.lone is not None
    described = side.lone.describe(progress)
    about = {"checksums": None, "hashes": described["hashes"], "graph": described}
    whole = {**model, "config": asdict(config), "dtype": side.kind, "parameters": parameter_count(config)}
    return Subject(graph.name, reports_folder(graph, None), whole, [side], [], about)


def comparison_report(subject: Subject, texts: Report, stages: Sequence[Report], against: Report, limits: Sequence[Report], why: str) -> Report:
    """All of the report but its verdict.

    Args:
        subject: what was run.
        texts: the report's ``text`` and ``texts``.
        stages: their entries.
        against: what they were held against.
        limits: the rows that judged them.
        why: there is no float16 floor.
    """
    floor = {"mean_abs": None, "max_abs": None, "mean_kl": None, "source": "not measured", "reason": why}
    seconds = round(time.perf_counter() - subject.started, 2)
    return {
        **schema.HEAD,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifact": subject.name,
        "model": subject.model,
        **texts,
        "float16": None,
        "floor": floor | {"check": tolerances.judge_reference(None, why)},
        "stages": list(stages),
        "not_run": subject.not_run,
        "engines": [],
        "against": against,
        "tolerances": list(limits),
        "versions": machine.versions(),
        "machine": machine.machine(),
        "seconds": seconds,
        "seconds_by_part": {entry["stage"]: entry["seconds"] for entry in stages},
        **subject.about,
    }


def write_comparison(report: Report, folder: Path) -> Report:
    """Write ``parity.{json,md,html,xml}`` into a folder; returns the report as it was written, with the folder as ``reports``."""
    finite: Report = without_nonfinite(report)
    for suffix, content in render_all(finite).items():
        with atomic_write(folder / f"parity.{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8", newline="\n")
    return finite | {"reports": str(folder)}


def folder_of(subject: Subject, other: str, out: Path | None) -> Path:
    """Where the reports go: ``out``, or a folder named after what it was held against."""
    return out or subject.folder / f"against-{other}"
