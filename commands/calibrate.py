"""calibrate: what activations look like, measured for the schemes that use it; done by `quantize`, a step of its own in the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifact.calibration import STATIC, calibration_file, calibration_step, calibration_tokens
from artifact.config import LlamaConfig
from artifact.errors import QuantizationError, UsageError
from artifact.given import given_of
from artifact.hashing import sha256_of
from artifact.manifest import read_manifest
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, run_step
from artifact.weight_files import check_weight_files
from engines.preflight import check_memory
from engines.step_costs import calibrate_cost

if TYPE_CHECKING:
    from validation.calibration_text import CalibrationText

NONE = "none"
TOKENIZER = "tokenizer.json"
TAKEN = "the checkpoint was quantised, and its own integers and scales are taken"


@dataclass(frozen=True)
class CalibrationOptions:
    """What activations are measured on.

    Attributes:
        calibration: a text's path; None is the text that comes with the toolkit, ``none`` no calibration.
        calibration_tokens, calibration_length: of all sequences together, and of one; None are the defaults, of tokens the scheme's.
    """

    calibration: str | None = None
    calibration_tokens: int | None = None
    calibration_length: int | None = None

    @property
    def given(self) -> str | None:
        """The first option that was given, as on the command line."""
        return next((f"--{name.replace('_', '-')}" for name, value in asdict(self).items() if value is not None), None)

    def tokens_for(self, scheme: str) -> int:
        """Of all sequences together, where a scheme is calibrated."""
        return calibration_tokens(scheme, self.calibration_tokens)

    def recorded(self) -> dict[str, Any]:
        """As a step's options: names of the command line."""
        return asdict(self)


def why_plain(artifact: Path, options: CalibrationOptions) -> str | None:
    """Why nothing can or shall be calibrated on, so that weights are rounded plainly, or not at all; None where there is calibration.

    Raises:
        QuantizationError: a text was given, and there is no tokenizer to read it with, or nothing trained to measure.
        UsageError: a text was given, and the checkpoint has all that calibration would find.
    """
    given = given_of(read_manifest(artifact)["model"])
    if given is not None and given.activations != "dynamic":
        if options.given:
            raise UsageError(f"{artifact}: {TAKEN}, and nothing is calibrated", hint=f"leave out {options.given}")
        return TAKEN
    if options.calibration == NONE:
        return "--calibration none"
    random = str(read_manifest(artifact)["model"]["format"]).startswith("random")
    reason = "random weights" if random else None if (artifact / TOKENIZER).is_file() else f"the artifact has no {TOKENIZER}"
    if reason is not None and options.calibration is not None:
        raise QuantizationError(f"{artifact} can't be calibrated on {options.calibration}: {reason}", hint="--calibration none rounds plainly")
    return reason


def calibrate(artifact: Path, scheme: str, options: CalibrationOptions, *, force: bool = False, progress: Progress = silent) -> Outcome:
    """Measure activations of the artifact's model on a text, and write the scheme's file of them."""
    source = None if options.calibration is None else Path(options.calibration)
    if source is not None and not source.is_file():
        raise QuantizationError(f"{source} is not a file", hint="--calibration FILE takes a UTF-8 text, or .jsonl; or none")
    recorded = options.recorded() | {"sha256": None if source is None else sha256_of(source)} | ({"scheme": scheme} if scheme in STATIC else {})

    def work(step: StepContext) -> Report:
        from validation.artifact_weights import artifact_reader
        from validation.calibration import write_statistics
        from validation.reference import Reference

        manifest = read_manifest(artifact)
        check_weight_files(artifact, manifest)
        model, config = manifest["model"], LlamaConfig(**manifest["model"]["config"])
        check_memory(calibrate_cost(config, options.tokens_for(scheme)), artifact)
        text = calibrated_text(artifact, config, scheme, options)
        return write_statistics(step, Reference(config, artifact_reader(artifact)), text, model["fingerprint"], calibration_file(scheme))

    return run_step(artifact, calibration_step(scheme), recorded, work, force=force, progress=progress)


def calibrated_text(artifact: Path, config: LlamaConfig, scheme: str, options: CalibrationOptions) -> CalibrationText:
    """What is calibrated on, and what of it is left."""
    from validation.calibration_text import load_sequences

    source = None if options.calibration is None else Path(options.calibration)
    return load_sequences(artifact, config, source, tokens=options.tokens_for(scheme), length=options.calibration_length)
