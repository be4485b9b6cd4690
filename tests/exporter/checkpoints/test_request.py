from __future__ import annotations

from pathlib import Path

import pytest

from artifact.errors import CheckpointError
from exporter.checkpoints import CheckpointRequest, open_request


def test_request_comes_back_from_its_record_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = CheckpointRequest("random:7", size="7b", lora=Path("adapter"))
    assert request.as_record() == {"source": "random:7", "size": "7b", "lora": str(tmp_path / "adapter")}
    assert CheckpointRequest.from_record(request.as_record()) == CheckpointRequest("random:7", size="7b", lora=tmp_path / "adapter")


def test_open_request_refuses_nothing_at_all() -> None:
    with pytest.raises(CheckpointError, match="no checkpoint was given"):
        open_request(CheckpointRequest())
