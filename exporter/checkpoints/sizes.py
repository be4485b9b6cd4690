"""Whether a checkpoint is of the size that was asked for."""

from __future__ import annotations

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.presets import preset

MUST_AGREE = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split()


def check_size(size: str, config: LlamaConfig, *, where: str) -> list[str]:
    """Compare a checkpoint's shape with the published one.

    A larger vocabulary is a padded or extended one. Epsilon is not compared: both 1e-5 and 1e-6 were published for one and the same size.

    Args:
        size: a key of ``PRESETS``.
        config: of the checkpoint.
        where: the checkpoint, for the message.

    Returns:
        What differs and may, one line each.

    Raises:
        UsageError: no such size.
        CheckpointError: another shape; every difference is named with both values.
    """
    published = preset(size)
    expected = [(name, getattr(published, name), getattr(config, name)) for name in MUST_AGREE]
    differences = [f"{name}: expected {wanted}, got {got}" for name, wanted, got in expected if wanted != got]
    if config.vocab_size < published.vocab_size:
        differences.append(f"vocab_size: expected at least {published.vocab_size}, got {config.vocab_size}")
    if differences:
        raise CheckpointError(
            f"{where} is not of size {size}: {'; '.join(differences)}",
            hint="leave --size out to take the checkpoint as it is, or give the checkpoint of that size",
        )
    return [
        f"{what}: {getattr(config, name)}, published {size}: {getattr(published, name)}"
        for name, what in (("vocab_size", "extended vocabulary"), ("max_position_embeddings", "another context length"))
        if getattr(config, name) != getattr(published, name)
    ]
