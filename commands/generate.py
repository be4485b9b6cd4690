"""generate: stream greedy text from any ONNX stage of an artifact on the CPU, or from its plan on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from artifact.config import LlamaConfig
from artifact.errors import ArtifactError, ValidationError
from artifact.manifest import require_artifact
from artifact.steps import require
from commands.sessions import check_stage, open_session
from validation.calls import Ids
from validation.greedy import Decoder, greedy

Report = dict[str, Any]


def generate(
    artifact: Path,
    prompt: str,
    *,
    stage: str = "fused",
    max_new_tokens: int = 32,
    capacity: int | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda piece: None,
) -> Report:
    """Continue a prompt with the likeliest token, again and again, until the model ends it.

    Args:
        artifact: the folder.
        prompt: taken as it is, without a chat template.
        stage: which graph: traced, fused, int8 or one of their engine graphs.
        max_new_tokens: how many tokens at most.
        capacity: slots of a static cache; None is what prompt and new tokens take, or what the graph or plan is fixed to.
        device: ``cpu`` runs the stage's graph, ``cuda`` the plan that was built from it.
        say: gets the text piece by piece.

    Returns:
        stage, backend, device, file, kv_cache, capacity (None of a dynamic cache), prompt, text, prompt_tokens, new_tokens, finished,
        time_to_first_token_ms, decode_tokens_per_s; on a GPU also skipped: plans that would have come first and are for another machine.

    Raises:
        UsageError: no stage has this name.
        ArtifactError: the stage is not there yet, or the artifact has no tokenizer.
        EngineError: no GPU, or no plan of this stage that runs here.
        ValidationError: the prompt is empty, or with the new tokens longer than the model's positions or the capacity; or a capacity was given for
            a dynamic cache.
    """
    config = LlamaConfig(**require_artifact(artifact, "generate", weights=True)["model"]["config"])
    check_stage(artifact, stage)
    if device == "cpu":
        require(artifact, f"{stage}.onnx")
    tokenizer = _tokenizer(artifact)
    ids = tokenizer.encode(prompt).ids
    _check_length(ids, config, max_new_tokens)
    with open_session(artifact, stage, device, batch=1, length=len(ids) + max_new_tokens, capacity=capacity) as opened:
        slots = _capacity(opened.decoder, len(ids), max_new_tokens, capacity)
        chosen = _choose(greedy(opened.decoder, [ids], slots or 0), tokenizer, _ends(config), max_new_tokens, say)
    return {
        "stage": stage,
        **opened.as_report(),
        "capacity": slots,
        "prompt": prompt,
        "text": tokenizer.decode(chosen.tokens),
        "prompt_tokens": len(ids),
        "new_tokens": len(chosen.tokens),
        "finished": len(chosen.tokens) < max_new_tokens,
        "time_to_first_token_ms": round(1000 * chosen.first_s, 1),
        "decode_tokens_per_s": round((len(chosen.tokens) - 1) / chosen.others_s, 1) if len(chosen.tokens) > 1 else None,
        **({} if device == "cpu" else {"skipped": list(opened.skipped)}),
    }


@dataclass(frozen=True)
class _Chosen:
    """Tokens up to the end that the model chose, or as many as were asked for; seconds of the first, and of all others together."""

    tokens: list[int]
    first_s: float
    others_s: float


def _choose(choices: Iterator[Ids], tokenizer: Tokenizer, ends: tuple[int, ...], count: int, say: Callable[[str], None]) -> _Chosen:
    """Take token after token, and say the text as it grows."""
    start, first, tokens, shown = time.perf_counter(), 0.0, list[int](), ""
    for token in (int(choice[0]) for choice in choices):
        first = first or time.perf_counter()
        if token in ends:
            break
        tokens.append(token)
        shown = _say_new(tokenizer.decode(tokens), shown, say)
        if len(tokens) == count:
            break
    return _Chosen(tokens, first - start, time.perf_counter() - first)


def _say_new(text: str, shown: str, say: Callable[[str], None]) -> str:
    """Say what the text has grown by; a character that is not whole yet waits for its next token."""
    if text.endswith("\ufffd") or not text.startswith(shown):
        return shown
    say(text[len(shown) :])
    return text


def _tokenizer(artifact: Path) -> Tokenizer:
    path = artifact / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(
            f"{artifact} has no tokenizer.json: its checkpoint came without one", hint="put the model's tokenizer.json into the folder"
        )
    return Tokenizer.from_file(str(path))


def _check_length(ids: list[int], config: LlamaConfig, max_new_tokens: int) -> None:
    if not ids:
        raise ValidationError("the prompt is empty")
    limit = config.max_position_embeddings
    if len(ids) + max_new_tokens > limit:
        raise ValidationError(
            f"the prompt has {len(ids)} tokens, and {max_new_tokens} more are asked for; the graph has {limit} positions",
            hint=f"--max-new-tokens {limit - len(ids)}" if len(ids) < limit else "shorten the prompt",
        )


def _capacity(runner: Decoder, prompt: int, max_new_tokens: int, asked: int | None) -> int | None:
    """Slots of a static cache; None of a dynamic one."""
    if runner.kv_cache == "dynamic":
        if asked is not None:
            raise ValidationError(f"--capacity {asked} is for a static cache; {runner.name} has a dynamic one, which grows", hint="leave it out")
        return None
    if runner.capacity is not None and asked not in (None, runner.capacity):
        raise ValidationError(f"--capacity {asked}: {runner.name} was built for {runner.capacity}", hint="leave it out")
    needed = prompt + max_new_tokens
    slots = runner.capacity or asked or needed
    if needed > slots:
        larger = f"--capacity {needed}" if runner.capacity is None else f"python cli.py build ART --capacity {needed}"
        hint = f"--max-new-tokens {slots - prompt}" if prompt < slots else larger
        raise ValidationError(f"the prompt has {prompt} tokens, and {max_new_tokens} more are asked for; the cache has {slots} slots", hint=hint)
    return slots


def _ends(config: LlamaConfig) -> tuple[int, ...]:
    ends = config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
