from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from artifact.errors import CheckpointError, UsageError
from exporter.checkpoints import CheckpointRequest, open_request, pin_request
from exporter.checkpoints.request import hub_id


def test_request_comes_back_from_its_record_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = CheckpointRequest("random:7", size="7b", lora=Path("adapter"))
    assert request.as_record() == {"source": "random:7", "size": "7b", "lora": str(tmp_path / "adapter")}
    assert CheckpointRequest.from_record(request.as_record()) == CheckpointRequest("random:7", size="7b", lora=tmp_path / "adapter")


def test_open_request_refuses_nothing_at_all() -> None:
    with pytest.raises(UsageError, match="no checkpoint was given"):
        open_request(CheckpointRequest())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (CheckpointRequest("x.gguf", config=Path("c.json")), "--config says the shape of random weights"),
        (CheckpointRequest(size="7b", config=Path("c.json")), "--config says the shape of random weights"),
        (CheckpointRequest("random"), "--checkpoint random needs a shape"),
        (CheckpointRequest("random:3", size="7b", config=Path("c.json")), "--checkpoint random:3 needs a shape, and one only"),
        (CheckpointRequest(".", revision="main"), "--revision is of a model on the hub"),
        (CheckpointRequest("demo", revision="main"), "--revision is of a model on the hub"),
        (CheckpointRequest("random", size="7b", revision="main"), "--revision is of a model on the hub"),
        (CheckpointRequest(revision="main"), "--revision is of a model on the hub"),
        (CheckpointRequest(size="8b"), "'8b' is not a published size"),
        (CheckpointRequest(".", size="8b"), "'8b' is not a published size"),
    ],
)
@pytest.mark.parametrize("use", [open_request, pin_request])
def test_options_that_do_not_go_together_are_usage_errors(
    use: Callable[[CheckpointRequest], object], request_: CheckpointRequest, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        use(request_)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize("source", [None, ".", "demo", "random:7", "x.gguf"])
def test_pin_request_leaves_what_is_not_on_the_hub_as_it_is(source: str | None) -> None:
    request = CheckpointRequest(source, size="7b" if source == "random:7" else None)
    assert pin_request(request) == request


@pytest.mark.parametrize("text", ["org/name", "meta-llama/Llama-2-7b-hf", "01-ai/Yi.1_5"])
def test_hub_id_knows_a_model(text: str) -> None:
    assert hub_id(text) == text


@pytest.mark.parametrize(
    "text", ["name", "./org/name", "../name", "/org/name", "~/name", "a/b/c", "org/x.gguf", "org/config.json", "org/", "a/..b", "a b/c"]
)
def test_hub_id_leaves_paths_alone(text: str) -> None:
    assert hub_id(text) is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [("org/" + "n" * 5000, "File name too long"), ("n" * 5000, "File name too long"), ("~no-such-user-here/x", "home")],
)
def test_open_request_names_a_source_that_no_file_can_have(source: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"not a path that can be looked at: .*{reason}") as caught:
        open_request(CheckpointRequest(source))
    assert caught.value.hint
    assert len(str(caught.value)) < 200


def test_hub_id_prefers_a_folder_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id("org/name") is None
    assert hub_id("org/other") == "org/other"
