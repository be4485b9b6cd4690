from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from artifact.errors import ArtifactError
from artifact.manifest import atomic_write, locked


def in_folder(out: Path) -> None:
    with locked(out):
        pass


def in_file(out: Path) -> None:
    with atomic_write(out) as temporary:
        temporary.write_text("new")


@pytest.mark.parametrize("write", [in_folder, in_file])
@pytest.mark.parametrize("inside", ["out", "deep/out"])
def test_an_out_below_a_file_is_one_error_with_a_hint(tmp_path: Path, write: Callable[[Path], None], inside: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"file/.*out can't be written: (Not a directory|File exists)") as caught:
        write(tmp_path / "file" / inside)
    assert "a file is where" in str(caught.value.hint)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_file_with_a_folders_name_is_one_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="folder can't be written: Is a directory") as caught:
        in_file(tmp_path / "folder")
    assert "a folder has this name" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
