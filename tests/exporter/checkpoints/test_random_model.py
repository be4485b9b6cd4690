from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError, UsageError
from artifact.layout import parameter_count
from exporter.checkpoints import CheckpointRequest, open_request
from exporter.checkpoints.random_model import RandomCheckpoint, open_random
from exporter.checkpoints.random_values import fill, normal_table, stream
from exporter.model import LlamaModel
from exporter.rope import rotary_tables
from exporter.weights import ROTARY_COS, ROTARY_SIN

GATE = "model.layers.0.mlp.gate_proj.weight"
GOLDEN = {
    "model.embed_tokens.weight": "d8f99911f38ce007447bbf15d512c883a304536182989b521d2006480a91c4f2",
    GATE: "a07f196aa5b751cdd28bc23a343ba08331a3ef9b2b45e7712243cfe7c93d7afb",
    "model.layers.1.mlp.down_proj.weight": "cdc5467d203f5df03a9e1323385adf9275de3c66059eb10078c59790ebf9beec",
    "model.norm.weight": "abc99a537e8087158d668a3773a5ccf6d95364872de17413201aab6f277e9252",
}
"""sha256 of some tensors of seed 7: they must not change, on any machine, without another ``RECIPE``."""


@pytest.fixture
def made(tmp_path: Path, config: LlamaConfig) -> Callable[..., RandomCheckpoint]:
    def make(source: str = "random:7", shape: LlamaConfig = config) -> RandomCheckpoint:
        (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
        return open_random(source, config=tmp_path / "config.json")

    return make


def test_random_weights_are_these_bytes_on_every_machine(made: Callable[..., RandomCheckpoint]) -> None:
    checkpoint = made()
    assert {name: hashlib.sha256(checkpoint.read(name).numpy().tobytes()).hexdigest() for name in GOLDEN} == GOLDEN


def test_fill_gives_splitmix64_of_a_counter() -> None:
    """The hash computed once more, in Python's own whole numbers."""
    key, table, mask = stream(7, "x"), normal_table(1.0, 0.0), (1 << 64) - 1
    ours = np.empty(9, dtype=np.float16)
    fill(ours, key, 2, table)
    for place, value in enumerate(ours, start=2):
        word, lane = divmod(place, 4)
        z = (key + word * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        assert value == table[(z >> (16 * lane)) & 0xFFFF]


def test_normal_table_is_a_bell() -> None:
    table = normal_table(0.02, 0.0).astype(np.float64)
    assert abs(table.mean()) < 1e-9
    assert table.std() == pytest.approx(0.02, rel=1e-4)
    assert 0.07 < table.max() == -table.min() < 0.08
    assert np.mean(np.abs(table) < 0.02) == pytest.approx(0.683, abs=0.01)
    assert (np.diff(table) >= 0).all()


def test_read_rows_does_not_depend_on_the_rows_asked_for(made: Callable[..., RandomCheckpoint], config: LlamaConfig) -> None:
    checkpoint = made(shape=replace(config, hidden_size=36, head_dim=10, intermediate_size=333, vocab_size=2999))  # rows that end within a hash
    for name, (rows, *_) in checkpoint.shapes.items():
        whole = checkpoint.read(name)
        assert whole.dtype == torch.float16
        for start, stop in ((0, rows), (1, 2), (rows - 1, rows), (rows // 3, rows // 2), (5, 5)):
            assert torch.equal(checkpoint.read_rows(name, start, stop), whole[start:stop]), (name, start, stop)


def test_random_weights_differ_between_seeds_names_and_rows(made: Callable[..., RandomCheckpoint]) -> None:
    ours, again, theirs = made("random"), made("random:0"), made("random:1")
    assert ours.fingerprint == again.fingerprint != theirs.fingerprint
    assert torch.equal(ours.read(GATE), again.read(GATE))
    assert not torch.equal(ours.read(GATE), theirs.read(GATE))
    rows = torch.cat([ours.read(name) for name, shape in ours.shapes.items() if shape[-1] == 32 and len(shape) == 2])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    norms = torch.stack([ours.read(name) for name, shape in ours.shapes.items() if shape == (32,)])
    assert len(torch.unique(norms, dim=0)) == len(norms) == 5


@pytest.mark.parametrize("tied", [False, True])
def test_activations_of_a_deep_random_model_stay_sane_in_float16(made: Callable[..., RandomCheckpoint], config: LlamaConfig, tied: bool) -> None:
    shape = replace(config, num_hidden_layers=40, hidden_size=64, intermediate_size=172, head_dim=16, vocab_size=512, tie_word_embeddings=tied)
    checkpoint = made("random:3", shape)
    with torch.device("meta"):
        model = LlamaModel(shape)
    tables = dict(zip((ROTARY_COS, ROTARY_SIN), rotary_tables(shape, torch.float16), strict=True))
    model.load_state_dict(tables | {name: checkpoint.read(name) for name in checkpoint.shapes}, assign=True)
    largest = [0.0]

    def note(_module: object, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        largest.extend(tensor.abs().max().item() for tensor in tensors if isinstance(tensor, torch.Tensor))

    for module in model.modules():
        module.register_forward_hook(note)
    positions, past = torch.arange(48)[None], torch.empty(1, shape.num_key_value_heads, 0, 16, dtype=torch.float16)
    with torch.no_grad():
        logits, _ = model(positions * 7 % 512, torch.ones_like(positions), positions, [(past, past)] * 40)
    assert torch.isfinite(logits).all()
    assert max(largest) < 1000
    assert 0.3 < logits.float().std() < 5
    assert len(logits.argmax(-1).unique()) > 24  # of 48 positions


def test_open_random_says_what_it_is(made: Callable[..., RandomCheckpoint], config: LlamaConfig, tmp_path: Path) -> None:
    checkpoint = made("random")
    assert (checkpoint.format, checkpoint.source, checkpoint.config) == ("random", "random:0", config)
    assert "quality" in checkpoint.notes[0]
    assert sum(np.prod(shape) for shape in checkpoint.shapes.values()) == parameter_count(config)
    (tmp_path / "out").mkdir()

    @contextmanager
    def write(relative: str) -> Iterator[Path]:
        yield tmp_path / "out" / relative

    assert checkpoint.write_sidecars(write) == ["config.json"]
    assert LlamaConfig.from_hf(json.loads((tmp_path / "out" / "config.json").read_text())) == config


@pytest.mark.parametrize("source", ["random:x", "random:", "random:-1", "random:1.5"])
def test_open_random_refuses_a_seed_that_is_none(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{source}: the seed must be a whole number$"):
        open_request(CheckpointRequest(source, config=tmp_path / "config.json"))


def test_open_random_needs_one_shape(tmp_path: Path) -> None:
    for options in ({}, {"size": "7b", "config": tmp_path / "config.json"}):
        with pytest.raises(CheckpointError, match=r"^random: random weights need one shape$"):
            open_random("random", **options)
        with pytest.raises(UsageError, match="needs a shape"):
            open_request(CheckpointRequest("random", **options))
    with pytest.raises(CheckpointError, match=r"^--config .*config\.json: no such file$"):
        open_request(CheckpointRequest("random", config=tmp_path / "config.json"))


def test_open_request_makes_up_a_published_size_without_its_bytes() -> None:
    checkpoint = open_request(CheckpointRequest("random:5", size="70b"))
    assert parameter_count(checkpoint.config) == 68_976_648_192
    assert checkpoint.name == "random-70b"
    assert checkpoint.read_rows("model.layers.79.mlp.down_proj.weight", 8000, 8001).shape == (1, 28672)
