"""Hugging Face's own Llama, module by module: its config, embedding, rotary values, masks, decoder layers, norm and head on the checkpoint's weights.

Nothing of it is ours but the loading, so a mistake that our model and our graphs share shows here. Modules are built on the meta device and given
their weights in float32 one at a time, so that 13B costs the memory of one layer. What transformers can't take is refused when the model is made:
its modules are built without weights, held against the checkpoint's names and shapes, and take two tokens, before anything is measured.
Letters: B batch, S new tokens, T columns so far, E hidden, V vocab, K kv heads, D head_dim.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifact.errors import ValidationError
from artifact.layout import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from exporter.checkpoints import Checkpoint

PACKAGE = "transformers"
MINIMUM = (5, 23)
"""The release whose modules are called as they are here; pyproject.toml asks for the same."""
ATTENTION = "eager"
"""Plain products, mask and softmax: no kernel that chooses an order of its own."""
AS_STORED = ("safetensors", "bin", "random")
STORED, READ = "as stored", "reordered, dequantised or merged by this toolkit's reader"
HINT = f"pip install '{PACKAGE}>={'.'.join(map(str, MINIMUM))}'"
TRIED = 2
"""Tokens that a model takes before anything is measured: the least that need a mask."""
LEAVE_OUT = f"leave out --against {PACKAGE}"
REFUSALS = (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError, OSError)
"""What transformers and torch raise of a config that they can't take, or of a module that its config and the call do not fit."""


def require_transformers() -> str:
    """The version that is installed.

    Raises:
        ValidationError: none is, or one that is too old.
    """
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ValidationError(f"--against {PACKAGE} needs {PACKAGE}, which is not installed", hint=HINT) from error
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MINIMUM:
        raise ValidationError(f"--against {PACKAGE} needs {PACKAGE} {'.'.join(map(str, MINIMUM))} or newer, installed is {version}", hint=HINT)
    return version


class TransformersModel:
    """The model that transformers makes of a checkpoint's config.json, its modules one at a time.

    Args:
        checkpoint: its config.json is read by transformers itself where it has one; of another format it is written from what was read.

    Attributes:
        config: transformers' own.

    Raises:
        ValidationError: transformers is not there, is too old or lacks a part, can't express the model, or has other weights than the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.version = require_transformers()
        self._read, self._shapes = checkpoint.read, checkpoint.shapes
        self.config_source, self.weights_source = config_source(checkpoint), weights_source(checkpoint)
        with tempfile.TemporaryDirectory(prefix="llama2trt-") as folder:
            checkpoint.write_sidecars(lambda name: _inside(Path(folder), name))
            with self._expressing():
                from transformers.models.llama import modeling_llama  # noqa: PLC0415 - slow to import

                self._modules = modeling_llama
                self.config = _read_config(folder)
                self.rotary = modeling_llama.LlamaRotaryEmbedding(self.config)
                self._require_modules()

    @property
    def name(self) -> str:
        """``transformers 5.23.0 LlamaForCausalLM, float32, eager attention``."""
        return f"{PACKAGE} {self.version} LlamaForCausalLM, float32, {ATTENTION} attention"

    def require_depth(self, layers: int) -> None:
        """Raise ValidationError unless transformers' config has so many layers."""
        if layers != self.config.num_hidden_layers:
            raise ValidationError(f"the reference has {layers} layers, {PACKAGE} {self.version} has {self.config.num_hidden_layers}")

    def embed(self, calls: Sequence[Tensor]) -> list[Tensor]:
        """[B, S] → [B, S, E] float32 of each call; the table is read once, and only these rows become float32."""
        table = self._read(EMBEDDING)
        return [nn.functional.embedding(ids, table).float() for ids in calls]

    def layer(self, number: int) -> nn.Module:
        """One decoder layer; its keys and values are the first of a cache of its own."""
        return self._loaded(self._new_layer(), layer_prefix(number))

    def norm(self) -> nn.Module:
        """The norm behind the last layer."""
        return self._loaded(self._new_norm(), _module(FINAL_NORM))

    def head(self) -> nn.Module:
        """[…, E] → [..., V]; the embedding where transformers ties it."""
        return self._loaded(self._new_head(), _module(self._head_name))

    def new_cache(self) -> Any:
        """Transformers' cache of one layer, empty."""
        from transformers.cache_utils import DynamicCache  # noqa: PLC0415

        return DynamicCache()

    def mask(self, state: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Any:
        """Transformers' mask of one call: state [B, S, E], attention_mask [B, T], position_ids [B, S], the cache before the call."""
        from transformers.masking_utils import create_causal_mask  # noqa: PLC0415

        return create_causal_mask(
            config=self.config, inputs_embeds=state, attention_mask=attention_mask, past_key_values=cache, position_ids=position_ids
        )

    @property
    def _head_name(self) -> str:
        return EMBEDDING if self.config.tie_word_embeddings else LM_HEAD

    def _new_layer(self) -> nn.Module:
        with torch.device("meta"):
            layer: nn.Module = self._modules.LlamaDecoderLayer(self.config, layer_idx=0)
        return layer

    def _new_norm(self) -> nn.Module:
        with torch.device("meta"):
            norm: nn.Module = self._modules.LlamaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        return norm

    def _new_head(self) -> nn.Module:
        return nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False, device="meta")

    def _loaded(self, module: nn.Module, prefix: str) -> nn.Module:
        module.load_state_dict({name: self._read(f"{prefix}.{name}").float() for name in module.state_dict()}, assign=True)
        return module.eval()

    @torch.inference_mode()
    def _require_modules(self) -> None:
        """Build every kind of module without weights, hold it against the checkpoint's of its name, and take two tokens through all."""
        layer, norm, head = self._new_layer(), self._new_norm(), self._new_head()
        table = nn.Embedding(self.config.vocab_size, self.config.hidden_size, device="meta")
        layers = {layer_prefix(number): layer for number in range(self.config.num_hidden_layers)}
        for prefix, module in {_module(EMBEDDING): table, **layers, _module(FINAL_NORM): norm, _module(self._head_name): head}.items():
            _check_names(module, prefix, self._shapes, self.version)
        state, positions = torch.zeros(1, TRIED, self.config.hidden_size), torch.arange(TRIED)[None]
        cache = self.new_cache()
        mask = self.mask(state, torch.ones_like(positions), positions, cache)
        rotary = tuple(tensor.to("meta") for tensor in self.rotary(state, position_ids=positions))
        asked = {"attention_mask": mask.to("meta"), "position_ids": positions.to("meta"), "position_embeddings": rotary}
        head(norm(layer.eval()(state.to("meta"), past_key_values=cache, use_cache=True, **asked)))

    @contextmanager
    def _expressing(self) -> Any:
        from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415 - comes with transformers, which has been asked for

        try:
            yield
        except ImportError as error:
            raise ValidationError(
                f"--against {PACKAGE} needs a part of {PACKAGE} {self.version} that can't be imported: {error}", hint=HINT
            ) from error
        except (StrictDataclassError, *REFUSALS) as error:
            raise ValidationError(f"{PACKAGE} {self.version} can't express this model: {error}", hint=LEAVE_OUT) from error


def config_source(checkpoint: Checkpoint) -> str:
    """Where transformers' config comes from: a mistake in our reading of a config.json shows only where it reads the file itself."""
    reads_it = checkpoint.format.partition("+")[0] in ("safetensors", "bin")
    return "the checkpoint's own config.json" if reads_it else f"a config.json written from what was read of the {checkpoint.format} checkpoint"


def weights_source(checkpoint: Checkpoint) -> str:
    """Whose weights both sides have: a mistake of our reader shows only where it takes them as they lie in the file."""
    return STORED if checkpoint.format in AS_STORED else READ


def _read_config(folder: str) -> Any:
    from transformers import LlamaConfig  # noqa: PLC0415

    return LlamaConfig.from_pretrained(folder, attn_implementation=ATTENTION)


@contextmanager
def _inside(folder: Path, name: str) -> Any:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    yield folder / name


def _module(weight: str) -> str:
    """``model.norm.weight`` → ``model.norm``."""
    return weight.removesuffix(".weight")


def _check_names(module: nn.Module, prefix: str, shapes: Mapping[str, tuple[int, ...]], version: str) -> None:
    """Raise ValidationError unless a module's weights are exactly the checkpoint's of its name, shape by shape."""
    wanted = {f"{prefix}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    there = {name: tuple(shape) for name, shape in shapes.items() if name.startswith(f"{prefix}.")}
    different = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if different:
        first = different[0]
        got = f"{first} is {wanted.get(first) or 'not there'} in {PACKAGE} {version}, {there.get(first) or 'not there'} in the checkpoint"
        raise ValidationError(f"{PACKAGE}' Llama is not this model: {got}", hint=LEAVE_OUT)
