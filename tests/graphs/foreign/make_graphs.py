"""How the graphs in pinned/ were made: one tiny Llama with random weights, by the exporters that people use. Not run by the tests.

    python tests/graphs/foreign/make_graphs.py dynamo      torch 2.13.0, transformers 5.23.0, onnxscript 0.7.2
    python tests/graphs/foreign/make_graphs.py bare        the same
    python tests/graphs/foreign/make_graphs.py checkpoint  the same; what they were exported from, as Hugging Face stores it
    python tests/graphs/foreign/make_graphs.py optimum     optimum-onnx 0.1.0 (TorchScript), torch 2.13.0, transformers 4.57.6
    python tests/graphs/foreign/make_graphs.py genai       onnxruntime-genai 0.18.0
    python tests/graphs/foreign/make_graphs.py pairs       torch 2.13.0, transformers 5.23.0, onnxscript 0.7.2
    python tests/graphs/foreign/make_graphs.py old         torch.onnx.export(dynamo=False) of torch 2.13.0 with numpy 1.26 and transformers 4.30.2,
                                                           then 4.36.2 and 4.46.3: each builds its mask and its tables of cosines in another way

Each in an environment of its own. Metadata and stack traces are stripped: they hold paths.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir
import torch
import transformers
from onnx_ir.passes import common as common_passes
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent / "pinned"
SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 32, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
WIDER = {"head_dim": 32}
"""ONNX Runtime's GroupQueryAttention takes multiples of 16; and the builder takes a linear as wide as the vocabulary for the lm_head."""
UNGROUPED = {"num_key_value_heads": 4}
DYNAMO = [(18, "eager", torch.float32), (18, "sdpa", torch.float32), (23, "sdpa", torch.float32), (18, "eager", torch.float16)]


class Flat(torch.nn.Module):
    """The cache as plain tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        found = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return found.logits, [(layer.keys, layer.values) for layer in found.past_key_values.layers]


def llama(**options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(1 + 0.1 * torch.randn_like(weight) if "norm" in name else torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    return model


def keep(path, name):
    model = ir.load(path)
    common_passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    FOLDER.mkdir(exist_ok=True)
    ir.save(ir.external_data.load_to_model(model), FOLDER / f"{name}.onnx")


def dynamo(folder, variants=DYNAMO, named="dynamo-{}-{}-{}".format):
    batch, new, past, layers = 2, 5, 7, SHAPE["num_hidden_layers"]
    tokens = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    cache = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    for opset, attention, dtype in variants:
        kept = lambda dtype=dtype: torch.randn(batch, SHAPE["num_key_value_heads"], past, SHAPE["head_dim"], dtype=dtype)  # noqa: E731
        inputs = {
            "input_ids": torch.zeros(batch, new, dtype=torch.int64),
            "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
            "position_ids": torch.arange(past, past + new)[None].repeat(batch, 1),
            "past": [(kept(), kept()) for _ in range(layers)],
        }
        names = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
        torch.onnx.export(
            Flat(llama(attn_implementation=attention).to(dtype)), (), folder / "model.onnx", kwargs=inputs, dynamo=True, opset_version=opset,
            dynamic_shapes={"input_ids": tokens, "attention_mask": tokens, "position_ids": tokens, "past": [(cache, cache)] * layers},
            input_names=[*list(inputs)[:3], *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            external_data=False, verbose=False,
        )  # fmt: skip
        keep(folder / "model.onnx", named(opset, attention, str(dtype).removeprefix("torch.")))


def bare(folder):
    """No cache, no positions, attention without groups: what a first try at torch.onnx.export gives."""
    model, tokens = llama(**UNGROUPED), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model.config.use_cache = False
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    torch.onnx.export(
        model, (), folder / "model.onnx", kwargs=inputs, dynamo=True, opset_version=18, dynamic_shapes={name: tokens for name in inputs},
        output_names=["logits"], external_data=False, verbose=False,
    )  # fmt: skip
    keep(folder / "model.onnx", "dynamo-18-bare")


def checkpoint(folder):
    for name, options in {"checkpoint": {}, "checkpoint-32": WIDER, "checkpoint-bare": UNGROUPED}.items():
        llama(**options).save_pretrained(folder)
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(folder / file, FOLDER / name / file)


def optimum(folder):
    from optimum.exporters.onnx import main_export

    llama().save_pretrained(folder / "checkpoint")
    for name, options in {"optimum-14": {"opset": 14}, "optimum-18": {"opset": 18}, "optimum-18-float16": {"opset": 18, "dtype": "fp16"}}.items():
        options |= {"task": "text-generation-with-past", "library_name": "transformers", "do_validation": False}
        main_export(str(folder / "checkpoint"), output=folder / name, **options)
        keep(folder / name / "model.onnx", name)


def rotate_pairs(q, k, cos, sin, unsqueeze_dim=1):
    """As Meta's own code does without complex numbers: even and odd elements, x [B, H, S, D/2, 2]."""
    cos, sin = (table[..., : table.shape[-1] // 2].unsqueeze(1) for table in (cos, sin))

    def rotated(x):
        even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(3)

    return rotated(q), rotated(k)


def rotate_repeated(q, k, cos, sin, unsqueeze_dim=1):
    """As GPT-J's code does: every second element, and each angle twice in a row."""
    cos, sin = (table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1).unsqueeze(1) for table in (cos, sin))

    def rotated(x):
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin

    return rotated(q), rotated(k)


def pairs(folder):
    from transformers.models.llama import modeling_llama

    for rotate, dtype, name in ((rotate_pairs, torch.float32, "pairs-18-float32"), (rotate_repeated, torch.float16, "pairs-18-repeated-float16")):
        modeling_llama.apply_rotary_pos_emb = rotate
        dynamo(folder, [(18, "eager", dtype)], lambda *_, name=name: name)


class FlatTuple(torch.nn.Module):
    """The cache as plain tensors, for versions that kept it in tuples."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        past = tuple(zip(past[::2], past[1::2], strict=True))
        if transformers.__version__ >= "4.36":
            past = transformers.cache_utils.DynamicCache.from_legacy_cache(past)
        found = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past, use_cache=True)
        kept = found.past_key_values if isinstance(found.past_key_values, tuple) else found.past_key_values.to_legacy_cache()
        return (found.logits, *(part for layer in kept for part in layer))


def old(folder):
    """Before 4.37 the width of a head could not be chosen; 4.30 has no grouped queries."""
    version = transformers.__version__.rpartition(".")[0]
    n_kv_heads, dtype = {"4.30": (4, torch.float16), "4.36": (2, torch.float32), "4.46": (2, torch.float16)}[version]
    model = FlatTuple(llama(num_key_value_heads=n_kv_heads, hidden_size=32).to(dtype))
    names = [f"{i}.{kind}" for i in range(SHAPE["num_hidden_layers"]) for kind in ("key", "value")]
    past = [torch.randn(2, n_kv_heads, 7, SHAPE["head_dim"], dtype=dtype) for _ in names]
    inputs = (torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64), torch.arange(7, 12)[None].repeat(2, 1), *past)
    tokens = {name: {0: "batch", 1: "new"} for name in ("input_ids", "position_ids", "logits")} | {"attention_mask": {0: "batch", 1: "total"}}
    cache = {f"past_key_values.{name}": {0: "batch", 2: "past"} for name in names} | {f"present.{name}": {0: "batch", 2: "total"} for name in names}
    torch.onnx.export(
        model, inputs, str(folder / "model.onnx"), dynamo=False, opset_version=17, dynamic_axes=tokens | cache,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
    )  # fmt: skip
    keep(folder / "model.onnx", f"torchscript-{version}-{str(dtype).removeprefix('torch.')}")


def genai(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(FOLDER / "checkpoint-32", folder / "checkpoint")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # the builder copies one
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "checkpoint")
    command = "-m onnxruntime_genai.models.builder -i checkpoint -o out -p fp32 -e cpu -c cache"
    subprocess.run([sys.executable, *command.split()], cwd=folder, check=True)
    keep(folder / "out" / "model.onnx", "genai")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = {"dynamo": dynamo, "bare": bare, "checkpoint": checkpoint, "optimum": optimum, "genai": genai, "pairs": pairs, "old": old}
        made[sys.argv[1]](Path(folder))
