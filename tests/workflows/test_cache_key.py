from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BASE = {"CHECKPOINT": "random:0", "SIZE": "7b", "PRECISIONS": "fp16", "TARGET": "a100-80gb", "MAX_BATCH": "4", "MAX_LENGTH": "", "REVISION": "main"}


def test_an_artifact_of_another_option_is_never_brought_back(cache_key: ModuleType) -> None:
    keys = cache_key.cache_keys(BASE)
    assert keys == cache_key.cache_keys(BASE)
    assert set(BASE) == {*cache_key.CHECKPOINT, *cache_key.OPTIONS}
    for name in BASE:
        assert not cache_key.cache_keys(BASE | {name: "8"})["key"].startswith(keys["restore-key"])


def test_an_artifact_of_older_sources_is_a_start(cache_key: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = cache_key.cache_keys(BASE)
    monkeypatch.setattr(cache_key, "rules_hash", lambda _files: "older sources")
    older = cache_key.cache_keys(BASE)
    assert older["key"] != keys["key"]
    assert older["restore-key"] == keys["restore-key"]
    assert older["key"].startswith(keys["restore-key"])


def test_key_is_of_the_checkpoints_content_not_of_its_place(cache_key: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    contents = [
        cache_key.content_of({"CHECKPOINT": str(make_checkpoint(tmp_path / name, seed=seed))}) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    assert contents[0]["fingerprint"]


def test_a_published_size_is_what_the_hub_has_now(cache_key: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"7b": {"repository": "meta-llama/Llama-2-7b-hf"}, "meta-llama/Llama-2-7b-hf": {"revision": "c0ffee"}}
    monkeypatch.setattr(cache_key, "inspect", described.__getitem__)
    assert cache_key.content_of({"CHECKPOINT": "", "SIZE": "7b"}) == {"revision": "c0ffee"}
    assert cache_key.content_of({"CHECKPOINT": "", "SIZE": ""}) == {}


def test_a_checkpoint_that_is_not_there_is_the_runs_to_report(cache_key: ModuleType, tmp_path: Path) -> None:
    assert cache_key.content_of({"CHECKPOINT": str(tmp_path / "nowhere")}) == {}
