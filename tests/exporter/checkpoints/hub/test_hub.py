from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError, UsageError
from artifact.presets import PRESETS
from exporter.checkpoints import CheckpointRequest, hub_download, open_request, pin_request

NAME = "org/Tiny-hf"
REQUEST = CheckpointRequest(NAME)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
Put = Callable[..., Path]


def refusal(request: CheckpointRequest) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as caught:
        open_request(request)
    return str(caught.value), caught.value.hint or ""


def test_hub_id_is_downloaded_and_read(hub: Any, sharded: Path, weights: dict[str, Tensor]) -> None:
    hub.add(NAME, sharded)
    checkpoint = open_request(REQUEST)
    assert (checkpoint.name, checkpoint.format) == ("tiny-hf", "safetensors")
    assert all(torch.equal(checkpoint.read(name), weights[name]) for name in checkpoint.shapes)


def test_only_what_is_read_is_downloaded(hub: Any, sharded: Path) -> None:
    hub.add(NAME, sharded)
    open_request(REQUEST)
    small = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    assert hub.downloads() == sorted([*small, *SHARDS])


def test_bin_is_downloaded_only_where_there_are_no_safetensors(hub: Any, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    hub.add(NAME, sharded)
    pin_request(REQUEST)
    assert "pytorch_model.bin" in hub.downloads()
    assert not set(SHARDS) & set(hub.downloads())


def test_size_is_said_before_the_first_weight_is_fetched(hub: Any, sharded: Path) -> None:
    hub.add(NAME, sharded)
    seen: list[tuple[str, bool]] = []
    open_request(REQUEST, progress=lambda what, done, total: seen.append((what, bool(set(SHARDS) & set(hub.downloads())))))
    first = next(index for index, (what, _) in enumerate(seen) if "downloading" in what)
    assert seen[first] == ("downloading org/Tiny-hf@0123456: 1 MB in 2 files, MiB", False)
    assert seen[-1][1]


def test_progress_counts_up_to_all_of_it(hub: Any, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "MIB", 1)
    hub.add(NAME, sharded)
    steps: list[tuple[int, int]] = []
    open_request(REQUEST, progress=lambda what, done, total: steps.append((done, total)) if "downloading" in what else None)
    size = sum((sharded / name).stat().st_size for name in SHARDS)
    assert steps[0] == (0, size)
    assert steps[-1] == (size, size)
    assert steps == sorted(steps)


def test_complete_snapshot_is_read_without_the_network(put_in_cache: Put, sharded: Path) -> None:
    put_in_cache(NAME, sharded)  # no hub here: the client would fail
    assert open_request(REQUEST).name == "tiny-hf"


def test_second_opening_asks_nobody(hub: Any, sharded: Path) -> None:
    hub.add(NAME, sharded)
    open_request(REQUEST)
    hub.asked.clear()
    open_request(REQUEST)
    assert hub.asked == []


def test_incomplete_snapshot_is_completed(hub: Any, put_in_cache: Put, sharded: Path) -> None:
    put_in_cache(NAME, sharded, leave_out=(SHARDS[1],))
    hub.add(NAME, sharded)
    open_request(REQUEST)
    assert hub.downloads() == [SHARDS[1]]


@pytest.mark.parametrize(("left_out", "named"), [(SHARDS[1], SHARDS[1]), ("config.json", "config.json")])
def test_incomplete_snapshot_offline_names_the_missing_file(put_in_cache: Put, sharded: Path, left_out: str, named: str) -> None:
    put_in_cache(NAME, sharded, leave_out=(left_out,))
    message, hint = refusal(REQUEST)
    assert message.endswith(f"the cached copy lacks {named}")
    assert "HF_HUB_OFFLINE" in message
    assert f"hf download {NAME}" in hint


def test_snapshot_with_only_a_tokenizer_is_not_complete(put_in_cache: Put, sharded: Path) -> None:
    put_in_cache(NAME, sharded, leave_out=(*SHARDS, "model.safetensors.index.json", "pytorch_model.bin"))
    assert refusal(REQUEST)[0].endswith("the cached copy lacks model.safetensors")


def test_revision_is_pinned_to_its_commit(hub: Any, sharded: Path, cache: Path) -> None:
    hub.add(NAME, sharded)
    pinned = pin_request(REQUEST)
    assert pinned == CheckpointRequest(NAME, revision=COMMIT)
    assert (cache / "models--org--Tiny-hf" / "refs" / "main").read_text() == COMMIT
    assert pin_request(pinned) == pinned


def test_pinned_request_reopens_the_old_commit_when_the_branch_has_moved(put_in_cache: Put, write_folder: Callable[..., Path], weights: Any) -> None:
    old, new = write_folder(name="old"), write_folder(name="new", tensors={name: tensor + 1 for name, tensor in weights.items()})
    put_in_cache(NAME, old)
    pinned = pin_request(REQUEST)
    put_in_cache(NAME, new, commit="f" * 40)
    assert open_request(pinned).fingerprint != open_request(REQUEST).fingerprint


def test_interrupted_download_goes_on_with_the_next_file(hub: Any, sharded: Path, cache: Path) -> None:
    model = hub.add(NAME, sharded, refused={SHARDS[1]: 404})
    assert "the hub answered 404" in refusal(REQUEST)[0]
    assert not (cache / "models--org--Tiny-hf" / "refs" / "main").exists()
    model.refused.clear()
    hub.asked.clear()
    open_request(REQUEST)
    assert hub.downloads() == [SHARDS[1]]


PARTS = ["consolidated.00.pth", "consolidated.01.pth"]


@pytest.mark.parametrize("revision", [None, COMMIT])
@pytest.mark.parametrize("refused", [0, 1])
def test_interrupted_download_of_meta_parts_goes_on(hub: Any, write_meta: Callable[..., Path], revision: str | None, refused: int) -> None:
    request = CheckpointRequest(NAME, revision=revision)
    model = hub.add(NAME, write_meta(parts=2), refused={PARTS[refused]: 404})
    assert "the hub answered 404" in refusal(request)[0]
    model.refused.clear()
    hub.asked.clear()
    assert open_request(request).format == "meta"
    assert hub.downloads() == PARTS[refused:]
    hub.asked.clear()
    open_request(request)
    assert hub.asked == []


@pytest.mark.parametrize("left_out", PARTS)
def test_incomplete_meta_snapshot_offline_names_the_missing_part(put_in_cache: Put, write_meta: Callable[..., Path], left_out: str) -> None:
    put_in_cache(NAME, write_meta(parts=2), leave_out=(left_out,))
    assert refusal(CheckpointRequest(NAME, revision=COMMIT))[0].endswith(f"the cached copy lacks {left_out}")


def test_token_is_sent_from_the_usual_place(hub: Any, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add(NAME, sharded)
    open_request(REQUEST)
    assert hub.tokens == {"Bearer hf_secret"}


def test_disk_too_small_is_found_before_the_first_weight(hub: Any, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, sharded, sizes={SHARDS[0]: 9 * 10**18})
    message, hint = refusal(REQUEST)
    assert message.startswith("org/Tiny-hf@0123456 needs 9,000,000,000,001 MB in")
    assert "HF_HOME" in hint
    assert not set(SHARDS) & set(hub.downloads())


def test_disk_that_fits_exactly_is_enough(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: namedtuple("Usage", "free")(1000))
    hub_download.check_space(1000, NAME)
    with pytest.raises(CheckpointError, match="needs"):
        hub_download.check_space(1001, NAME)


class TestRefusals:
    """No network, no access, no such model and no such revision are four errors with four hints."""

    def test_offline(self, cache: Path) -> None:
        message, hint = refusal(CheckpointRequest(size="7b"))
        assert message == "meta-llama/Llama-2-7b-hf is neither a folder here nor in the hub's local cache, and HF_HUB_OFFLINE forbids to fetch it"
        assert "unset HF_HUB_OFFLINE" in hint

    def test_no_network(self, hub: Any) -> None:
        hub.stop()
        message, hint = refusal(CheckpointRequest(size="13b"))
        assert message.startswith("meta-llama/Llama-2-13b-hf is neither a folder here nor in the hub's local cache, and http://127.0.0.1")
        assert "can't be reached" in message
        assert "network" in hint

    def test_gated_and_nobody_logged_in(self, hub: Any, sharded: Path) -> None:
        hub.add("meta-llama/Llama-2-7b-hf", sharded, gated=401)
        message, hint = refusal(CheckpointRequest(size="7b"))
        assert message == "meta-llama/Llama-2-7b-hf is gated: its licence must be accepted, and nobody is logged in"
        assert f"{hub.endpoint}/meta-llama/Llama-2-7b-hf" in hint
        assert "hf auth login" in hint
        assert "HF_TOKEN" in hint

    def test_gated_and_not_accepted(self, hub: Any, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        hub.add(NAME, sharded, gated=403)
        message, hint = refusal(REQUEST)
        assert message == "org/Tiny-hf is gated: the account of this token has no access yet"
        assert f"accept the licence at {hub.endpoint}/{NAME}" in hint

    def test_unknown_model(self, hub: Any) -> None:
        message, hint = refusal(REQUEST)
        assert message.startswith("org/Tiny-hf: no such folder here, and no such model on the hub")
        assert "spelling" in hint

    def test_unknown_revision(self, hub: Any, sharded: Path) -> None:
        hub.add(NAME, sharded)
        message, hint = refusal(CheckpointRequest(NAME, revision="v9"))
        assert message == "org/Tiny-hf has no revision v9"
        assert f"{hub.endpoint}/{NAME}/tree/main" in hint

    @pytest.mark.parametrize(("status", "words"), [(500, "the hub answered 500"), (403, "the token may not read"), (429, "refuses more requests")])
    def test_other_answers(self, hub: Any, status: int, words: str) -> None:
        hub.status = status
        assert words in refusal(REQUEST)[0]

    @pytest.mark.parametrize("revision", ["../../etc", "a b", "/x", "..", ""])
    def test_revision_that_is_no_name(self, cache: Path, revision: str) -> None:
        with pytest.raises(UsageError, match="is not a branch, tag or commit"):
            open_request(CheckpointRequest(NAME, revision=revision))

    def test_cache_that_cannot_be_written(self, hub: Any, sharded: Path, cache: Path) -> None:
        cache.write_text("in the way")
        hub.add(NAME, sharded)
        message, hint = refusal(REQUEST)
        assert "can't be written to the hub's cache" in message
        assert "HF_HOME" in hint

    def test_no_client_library(self, tmp_path: Path) -> None:
        code = (
            "import sys; sys.modules['huggingface_hub'] = None\n"
            "from exporter.checkpoints.hub import fetch_snapshot\n"
            f"fetch_snapshot('{NAME}', None, print, print)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"HF_HUB_CACHE": str(tmp_path)})
        assert "huggingface_hub is not installed" in result.stderr

    def test_model_of_another_architecture_is_not_downloaded(self, hub: Any, sharded: Path, config: LlamaConfig) -> None:
        (sharded / "config.json").write_text(json.dumps(config.to_hf() | {"model_type": "mistral"}))
        hub.add(NAME, sharded)
        assert "model_type is 'mistral'" in refusal(REQUEST)[0]
        assert not set(SHARDS) & set(hub.downloads())

    def test_model_of_another_size_is_not_downloaded(self, hub: Any, sharded: Path) -> None:
        hub.add(NAME, sharded)
        assert "org/Tiny-hf is not of size 7b: num_hidden_layers: expected 32, got 2" in refusal(CheckpointRequest(NAME, size="7b"))[0]
        assert not set(SHARDS) & set(hub.downloads())

    def test_index_that_names_a_file_the_model_does_not_have(self, hub: Any, sharded: Path) -> None:
        (sharded / SHARDS[1]).unlink()
        hub.add(NAME, sharded)
        assert f"model.safetensors.index.json names {SHARDS[1]}, which the model does not have" in refusal(REQUEST)[0]

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
    def test_index_that_names_a_file_outside_the_folder(self, hub: Any, sharded: Path, name: str) -> None:
        index = sharded / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        hub.add(NAME, sharded)
        assert "not a path inside the folder" in refusal(REQUEST)[0]

    @pytest.mark.parametrize(("file", "words"), [("model.Q4_0.gguf", "hf download org/Tiny-hf FILE.gguf"), ("adapter_model.safetensors", "--lora")])
    def test_model_in_another_form(self, hub: Any, tmp_path: Path, file: str, words: str) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / file).write_text("x")
        hub.add(NAME, tmp_path / "other")
        message, hint = refusal(REQUEST)
        assert "no weights that can be read" in message
        assert words in hint


@pytest.mark.parametrize("size", [size for size, row in PRESETS.items() if row.repository is None])
def test_llama_1_has_no_repository(size: str) -> None:
    message, hint = refusal(CheckpointRequest(size=size))
    assert "has no published repository" in message
    assert f"--size {size} --checkpoint FOLDER" in hint
