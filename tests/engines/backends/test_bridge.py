"""engines/backends/bridge.py: a disk that is full at the last byte is told as such."""

from __future__ import annotations

from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifact.errors import EngineError

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_full_disk_is_an_error_with_a_hint_when_it_is_found_out_at_the_end_too(size: int) -> None:
    """Few bytes wait in a buffer until the file is closed; many are written at once."""
    from engines.backends.bridge import PlanFile, write_plan

    def build(network: Any, config: Any, writer: PlanFile) -> bool:
        return writer.write(b"x" * size) == size

    builder, logger = SimpleNamespace(build_serialized_network_to_stream=build), SimpleNamespace(errors=[])
    with pytest.raises(EngineError, match=r"the plan can't be written: .*No space left") as error:
        write_plan(builder, None, None, FULL, logger, Path("g.onnx"))  # type: ignore[arg-type]
    assert error.value.__cause__.errno == ENOSPC  # type: ignore[union-attr]
    assert error.value.hint == "free disk space and build again"
