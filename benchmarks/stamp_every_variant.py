"""Is the stamped graph the full trace? Every variant of the model, in both cache forms, at depths 1, 2, 3 and 5.

    python -m benchmarks.stamp_every_variant        exit code 1 where one differs; some ten minutes on two cores

The tests try a choice of these in which each pair of options meets.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

from artifact.config import LlamaConfig
from exporter.stamp import stamp_layers
from exporter.trace import trace_model
from graphs.diff import compare_graphs

TINY = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
CHOICES = {"num_key_value_heads": (2, 4), "tie_word_embeddings": (False, True), "attention_bias": (False, True)}
DEPTHS = (1, 2, 3, 5)


def main() -> None:
    """Print one line a variant and depth."""
    differing = 0
    for kv_cache, *chosen in itertools.product(("dynamic", "static"), *CHOICES.values()):
        options = dict(zip(CHOICES, chosen, strict=True))
        config = replace(TINY, **options)
        layer = trace_model(config, "fp16", kv_cache)
        for depth in DEPTHS:
            deep = replace(config, num_hidden_layers=depth)
            full, stamped = trace_model(deep, "fp16", kv_cache), stamp_layers(layer.clone(), deep)
            same = compare_graphs(full, stamped).same and full.graph.num_nodes() == stamped.graph.num_nodes()
            differing += not same
            variant = ", ".join(f"{name} {value}" for name, value in options.items())
            print(f"{kv_cache}, {variant}, depth {depth}: {full.graph.num_nodes()} nodes, {'the same graph' if same else 'DIFFERENT'}", flush=True)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
