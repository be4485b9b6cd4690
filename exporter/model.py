"""The reference Llama in PyTorch: config → attention → MLP → layer → model, and nothing else.

Checked against Hugging Face transformers' Llama (tests/exporter/test_model.py); traced to ONNX by exporter/trace.py.
Letters: B batch, S new tokens, P past, T = P + S, H query heads, K kv heads, D head_dim, E hidden, F ffn, V vocab.
Source: LLaMA, arXiv:2302.13971; grouped-query attention, arXiv:2305.13245.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from artifact.config import LlamaConfig
from exporter.rope import apply_rotary

Cache = tuple[Tensor, Tensor]
"""Keys and values of one layer: [B, K, P, D] each."""


class RMSNorm(nn.Module):
    """Scale to unit root mean square; the statistics are float32 whatever the activations are."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] → [B, S, E], dtype of ``x``."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and a cache."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.n_groups = config.num_attention_heads // config.num_key_value_heads
        query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """Attend to the past and to the new tokens.

        Args:
            x: [B, S, E] float16 | float32.
            cos, sin: [B, 1, S, D/2], dtype of ``x``.
            mask: [B, 1, S, T] bool, True = attend.
            past: keys and values [B, K, P, D], dtype of ``x``.

        Returns:
            [B, S, E] and the present keys and values [B, K, T, D].
        """
        query = apply_rotary(self._heads(self.q_proj(x)), cos, sin) * self.head_dim**-0.5  # [B, H, S, D]
        key = torch.cat((past[0], apply_rotary(self._heads(self.k_proj(x)), cos, sin)), dim=2)  # [B, K, T, D]
        value = torch.cat((past[1], self._heads(self.v_proj(x))), dim=2)  # [B, K, T, D]
        scores = query @ self._repeat(key).transpose(-1, -2)  # [B, H, S, T]
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores.float(), dim=-1).to(x.dtype)
        context = (weights @ self._repeat(value)).transpose(1, 2).flatten(2)  # [B, S, H·D]
        output: Tensor = self.o_proj(context)
        return output, (key, value)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, S, n·D] → [B, n, S, D]
        return heads

    def _repeat(self, x: Tensor) -> Tensor:
        if self.n_groups == 1:
            return x
        batch, n_kv_heads, total, head_dim = x.shape
        return x[:, :, None].expand(batch, n_kv_heads, self.n_groups, total, head_dim).flatten(1, 2)  # [B, K, T, D] → [B, H, T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] → [B, S, E]."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class DecoderLayer(nn.Module):
    """Norm, attention, residual; norm, MLP, residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """[B, S, E] → [B, S, E] and the present cache; arguments as in ``Attention.forward``."""
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class RotaryTables(nn.Module):
    """The cosine and sine tables as buffers; reading them by position."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        shape = (config.max_position_embeddings, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(shape))
        self.register_buffer("sin", torch.empty(shape))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] int64 → cos, sin [B, 1, S, D/2], for all layers and heads."""
        cos, sin = F.embedding(position_ids, self.get_buffer("cos")), F.embedding(position_ids, self.get_buffer("sin"))
        return cos.unsqueeze(1), sin.unsqueeze(1)


class Decoder(nn.Module):
    """Embedding, layers, final norm: the ``model`` of Hugging Face's ``LlamaForCausalLM``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryTables(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Cache]) -> tuple[Tensor, list[Cache]]:
        """Token ids → final hidden states [B, S, E] and the present caches; arguments as in ``LlamaModel.forward``."""
        mask = attention_allowed(attention_mask, input_ids.shape[1])
        cos, sin = self.rotary_emb(position_ids)
        x = self.embed_tokens(input_ids)
        presents = []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x, present = layer(x, cos, sin, mask, layer_past)
            presents.append(present)
        return self.norm(x), presents


class LlamaModel(nn.Module):
    """Decoder and lm_head; parameter names are Hugging Face's, a tied lm_head is the embedding itself."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Cache]) -> tuple[Tensor, list[Cache]]:
        """One forward pass over new tokens.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, T] int64, 1 = real token, 0 = padding (left padding).
            position_ids: [B, S] int64, below max_position_embeddings.
            past: per layer keys and values [B, K, P, D]; P may be 0.

        Returns:
            logits [B, S, V] and per layer the present keys and values [B, K, T, D].
        """
        hidden, presents = self.model(input_ids, attention_mask, position_ids, past)
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight), presents


def attention_allowed(attention_mask: Tensor, n_new: int) -> Tensor:
    """Which keys each new token may attend to: real ones at or before it, and always itself.

    A row is never fully masked, not even a padded one: NaN there would poison real rows on a GPU.

    Args:
        attention_mask: [B, T] int64.
        n_new: S; the new tokens are the last S of T.

    Returns:
        [B, 1, S, T] bool, True = attend.
    """
    total = attention_mask.shape[1]
    key = torch.arange(total, device=attention_mask.device)  # [T]
    query = torch.arange(n_new, device=attention_mask.device)[:, None] + (total - n_new)  # [S, 1]
    return ((key < query) & attention_mask[:, None, None, :].bool()) | (key == query)
