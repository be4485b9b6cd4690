"""What the reference says next, greedily, and the first token at which a stage says something else.

The reference decodes once. A stage is then fed each prompt with the reference's continuation: as long as its best token is the next one there, its
own greedy continuation is the same, and where it first is not, that diverges. So one call a prompt tells what decoding would.
Letters: B prompts, P tokens of each, N tokens that follow, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from artifact.layout import EMBEDDING, parameter_count
from exporter.model import attention_allowed
from exporter.rope import rotary_tables
from validation.floor import STREAMED_ABOVE
from validation.reference import Reference

Ids = NDArray[np.int64]
PROMPTS = (
    "The capital of France is a city that",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Water boils at a lower temperature in the mountains because",
    "Once upon a time there was a small dragon who",
)
"""A fact, code, an explanation and a story: where a form of a model goes astray differs by kind."""
LENGTH = 32
"""Tokens that follow, at most; fewer where the model is short."""
TOO_LARGE = f"the reference is decoded in memory, up to {STREAMED_ABOVE / 1e9:.1f} B parameters"


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the reference says next.

    Attributes:
        prompt: [P] int64, BOS first where the model has one.
        tokens: [N] int64.
        margins: best − second best logit of the reference at each of them.
    """

    text: str
    prompt: Ids
    tokens: Ids
    margins: NDArray[np.float32]

    @property
    def ids(self) -> Ids:
        """What a stage is fed: all but the last token."""
        return np.concatenate((self.prompt, self.tokens[:-1]))

    def compare(self, logits: Callable[[Ids], NDArray[Any]]) -> dict[str, Any]:
        """The first token at which the greedy continuation differs, counted from 0; None where all are the same.

        Args:
            logits: token ids [L] → [L, V].
        """
        given = logits(self.ids)[len(self.prompt) - 1 :]
        wrong = np.flatnonzero(given.argmax(axis=-1) != self.tokens)
        first = int(wrong[0]) if len(wrong) else None
        margin = None if first is None else float(self.margins[first])
        return {"prompt": self.text, "tokens": len(self.tokens), "diverges_at": first, "reference_margin": margin}


def fits_in_memory(reference: Reference) -> bool:
    """Whether the reference is decoded at all: its layers stay in memory, as the floor's do."""
    return parameter_count(reference.config) <= STREAMED_ABOVE


@torch.inference_mode()
def continue_prompts(reference: Reference, prompts: Sequence[tuple[str, Ids]], length: int = LENGTH) -> list[Continuation]:
    """Greedy continuations by the float32 reference.

    Args:
        reference: its layers are held in memory.
        prompts: (text, ids); cut to the shortest's tokens, so that they are one batch without padding.
        length: tokens that follow, fewer where the model's own maximum is reached.
    """
    shortest = min(len(ids) for _, ids in prompts)
    batch = torch.from_numpy(np.stack([ids[:shortest] for _, ids in prompts]))  # [B, P]
    steps = min(length, reference.config.max_position_embeddings - shortest)
    chosen, margins = _decode(reference, batch, steps)
    rows = zip(prompts, batch.numpy(), chosen.numpy(), margins.numpy(), strict=True)
    return [Continuation(text, ids, tokens, margin) for (text, _), ids, tokens, margin in rows]


def _decode(reference: Reference, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and margins [B, N] after [B, P] ids."""
    config = reference.config
    layers = [reference.decoder_layer(index) for index in range(config.num_hidden_layers)]
    embedding, norm, head = reference.read(EMBEDDING), reference.final_norm(torch.float32), reference.lm_head
    cos, sin = rotary_tables(config, torch.float32)
    empty = torch.empty(len(ids), config.num_key_value_heads, 0, config.head_dim)
    caches, new, past, found = [(empty, empty)] * len(layers), ids, 0, []
    for _ in range(steps):
        total = past + new.shape[1]
        mask = attention_allowed(torch.ones(len(ids), total, dtype=torch.int64), new.shape[1])
        state = F.embedding(new, embedding).float()  # [B, S, E]
        for index, layer in enumerate(layers):
            state, caches[index] = layer(state, cos[None, None, past:total], sin[None, None, past:total], mask, caches[index])
        best = F.linear(norm(state[:, -1]), head).topk(2)  # [B, 2]
        found.append((best.indices[:, 0], best.values[:, 0] - best.values[:, 1]))
        new, past = found[-1][0][:, None], total
    return tuple(torch.stack(side, dim=1) for side in zip(*found, strict=True))  # type: ignore[return-value]
