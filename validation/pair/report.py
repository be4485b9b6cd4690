"""``validate --against ART|FILE.onnx``: two graphs on the same tokens, compared; judged only where a limit is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.hashing import sha256_of
from artifact.progress import Progress
from validation import calibrated_on, perplexity
from validation.comparison import Subject, comparison_report, folder_of, write_comparison
from validation.limit_rows import rows
from validation.oracle import scored_of
from validation.pair.measure import Report, compare_layers, limits_of, measure_pair
from validation.pair.oracle import NO_FLOOR, make_oracle
from validation.parity import first_mismatch, overall, verdict
from validation.perplexity import Window
from validation.prepare import read_texts
from validation.scenarios import Scenario, make_scenarios, split_sequences
from validation.side import Side
from validation.streamed_runner import Finished
from validation.text import TOKENIZER, Tokens
from validation.watched import Watched

SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim")
"""What two graphs must share to be given the same tokens and to be compared layer by layer."""
HINT = "--against takes another form of the same model: an artifact folder, or a stage's .onnx"


@dataclass(frozen=True)
class Asked:
    """How two graphs are compared.

    Attributes:
        texts: to score; None are the committed ones, ``tokens`` of them together.
        max_kl: the largest mean divergence, nats; None judges nothing.
        tokenizer: folder that holds it; without one ids are random.
        out: folder of the reports; None is beside the subject's own.
    """

    texts: Sequence[Path] | None
    tokens: int | None
    max_kl: float | None
    tokenizer: Path
    out: Path | None


def require_same_shape(ours: LlamaConfig, theirs: LlamaConfig, name: str, *, there: Path | None = None, here: Path | None = None) -> None:
    """Refuse a graph of another shape, or with another tokenizer.

    Args:
        ours, theirs: of both models.
        name: of the other one.
        there, here: folders whose tokenizers must be the same, where both have one.

    Raises:
        ValidationError: the message says what differs, and both values.
    """
    values = [(key, getattr(ours, key), getattr(theirs, key)) for key in SHAPE]
    if different := [f"{key} is {other} there, {own} here" for key, own, other in values if own != other]:
        raise ValidationError(f"{name} can't be compared: {'; '.join(different)}", hint=HINT)
    if there is None or here is None or not ((there / TOKENIZER).is_file() and (here / TOKENIZER).is_file()):
        return
    hashes = [sha256_of(folder / TOKENIZER)[:12] for folder in (there, here)]
    if hashes[0] != hashes[1]:
        raise ValidationError(f"{name} can't be compared: another {TOKENIZER}: {hashes[0]} there, {hashes[1]} here", hint=HINT)


def compare_graphs(subject: Subject, others: dict[str, Side], other: Report, asked: Asked, progress: Progress) -> Report:
    """Compare each of a subject's graphs with another, and write ``parity.{json,md,html,xml}``.

    Args:
        subject: what is compared.
        others: name of a side of the subject → what it is held against; sides that are not here are left out by the caller.
        other: name of what it is held against; model and checksums of an artifact, hashes of a lone file.
        asked: how.
        progress: told what is being done.

    Returns:
        The report; ``passed`` is None where no limit was asked for and all is finite.
    """
    config = subject.sides[0].config
    texts, windows = read_texts(asked.tokenizer, config, asked.texts, asked.tokens)
    main, short = split_sequences(config, texts[0].ids, texts[0].bos)
    scenarios = make_scenarios(config, main, short)
    entries, pairs, finished = list[Report](), list[Report](), dict[Path, Finished]()
    for side in subject.sides:
        theirs = others[side.name]
        one = side.one_position or theirs.one_position
        entry, pair = _compare(subject, (theirs, side), _Tokens(scenarios, texts, [] if one else windows, finished), asked.max_kl, progress)
        entries.append(entry)
        pairs.append(pair)
    both = [(others[side.name], side) for side in subject.sides]
    limits = [row for pair in both for row in rows(pair[1].name, limits_of(asked.max_kl, pair, streamed=subject.streamed))]
    against = {"kind": "graph", **other, "pairs": pairs, "max_kl": asked.max_kl}
    report = comparison_report(subject, _texts(subject, texts, windows), entries, against, limits, NO_FLOOR)
    stored = (other.get("checksums") or {}).get("passed")
    report["passed"] = False if stored is False else overall(report | {"against": None})
    report["against"]["passed"] = report["passed"]
    report |= {"verdict": verdict(report), "headline": _headline(report)}
    return write_comparison(report, folder_of(subject, str(other["name"]).removesuffix(".onnx").replace("/", "-"), asked.out))


@dataclass(frozen=True)
class _Tokens:
    """What both graphs are given; ``finished`` is what was computed of each other graph, by its file."""

    scenarios: tuple[Scenario, ...]
    texts: list[Tokens]
    windows: list[Window]
    finished: dict[Path, Finished]


def _compare(subject: Subject, sides: tuple[Side, Side], given: _Tokens, max_kl: float | None, progress: Progress) -> tuple[Report, Report]:
    """The entry of the second graph of two, and the pair's own part of the report."""
    theirs, side = sides
    if theirs.one_position and not side.one_position:
        raise ValidationError(
            f"{theirs.name} gives one position a call, {side.name} all: they can't be compared", hint="--stage names an engine graph of its own"
        )
    both, left_out = agree(theirs, side, given.scenarios)
    sequences = [window.inputs for window in given.windows]
    truth, runner = (
        Watched(
            one.open(given.scenarios, streamed=subject.streamed, finished=given.finished.setdefault(one.graph, Finished()), progress=progress), one
        )
        for one in sides
    )
    for one in (truth, runner):
        one.runner.expect(both, sequences)
    oracle = make_oracle(theirs, truth, subject.folder, both, (given.texts, given.windows), subject.residency)
    entry = measure_pair(oracle, runner, limits_of(max_kl, sides, streamed=subject.streamed), progress)
    pair = {"stage": side.name, "with": theirs.name, "sha256": sha256_of(theirs.graph), "left_out": left_out}
    return entry, pair | {"layers": compare_layers(theirs, side, oracle, progress)}


def agree(theirs: Side, ours: Side, scenarios: tuple[Scenario, ...]) -> tuple[tuple[Scenario, ...], list[Report]]:
    """The scenarios as far as both graphs take them, and scenario and reason of what either does not.

    Raises:
        ValidationError: nothing is left.
    """
    plans = [theirs.plan(scenarios)]
    plans.append(ours.plan(plans[0].scenarios))
    plans.append(theirs.plan(plans[1].scenarios))  # what ours cut short theirs takes as well, or not at all
    left_out = [{"scenario": name, "reason": reason} for plan in plans for name, reason in plan.not_run]
    if not plans[-1].scenarios:
        reasons = "; ".join(f"{one['scenario']}: {one['reason']}" for one in left_out)
        raise ValidationError(f"{theirs.name} and {ours.name} take no scenario that is the same: {reasons}", hint=HINT)
    return plans[-1].scenarios, left_out


def _texts(subject: Subject, texts: list[Tokens], windows: list[Window]) -> Report:
    counts = scored_of(texts, windows)
    each = [text.as_report(count) for text, count in zip(texts, counts, strict=True)]
    size = min(perplexity.WINDOW, subject.sides[0].config.max_position_embeddings)
    shape = {"window": size, "stride": perplexity.stride_of(size), "bos": texts[0].bos} if windows else {}
    whole = texts[0].as_report(sum(counts)) | {"name": ", ".join(text.name for text in texts)} | shape
    stages = [side.name for side in subject.sides]
    return {"text": whole, "texts": calibrated_on.mark_hashes(each, subject.manifest, stages) if subject.manifest else each}


def _headline(report: Report) -> str:
    if mismatch := first_mismatch(report | {"against": None}):
        return mismatch
    if stored := first_mismatch(report | {"against": None, "checksums": report["against"].get("checksums")}):
        return f"against {report['against']['name']}: {stored}"
    said = [_said(stage, pair) for stage, pair in zip(report["stages"], report["against"]["pairs"], strict=True)]
    judged = "" if report["passed"] else ": compared, not judged (--max-kl NATS makes it a gate)"
    return f"against {report['against']['name']}: {'; '.join(said)}{judged}"


def _said(stage: Report, pair: Report) -> str:
    """``int8: KL 0.0029, perplexity +0.10 %, first layer that differs 3``."""
    increase = "" if stage["perplexity_increase_pct"] is None else f", perplexity {stage['perplexity_increase_pct']:+.2f} %"
    layers = pair["layers"]
    if "missing" in layers:
        where = ""
    elif layers["worst"] is None:
        where = ", every layer the same"
    else:
        first = layers["first"]
        where = (
            f", {'no layer differs by more than rounding' if first is None else f'first layer that differs {first}'}, most layer {layers['worst']}"
        )
    kl = "not finite" if stage["mean_kl"] is None else f"{stage['mean_kl']:.2g}"
    return f"{stage['stage']}: KL {kl}{increase}{where}"
