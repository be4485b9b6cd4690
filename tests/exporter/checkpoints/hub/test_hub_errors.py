from __future__ import annotations

import errno
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import errors

from exporter.checkpoints.hub_errors import explain

NAME = "org/tiny"


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "org/tiny can't be written to the hub's cache: the disk is full", "HF_HOME"),
        (OSError(errno.EDQUOT, "Quota"), "org/tiny can't be written to the hub's cache: the disk quota is used up", "HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/hub"), "org/tiny can't be written to the hub's cache: [Errno 13]", "HF_HOME"),
        (OSError("Consistency check failed: 10 bytes"), "org/tiny: the download broke off: Consistency check failed: 10 bytes", "goes on"),
        (errors.XetDownloadError("lost"), "org/tiny: the download broke off: lost", "goes on"),
        (httpx2.ProxyError("407"), "org/tiny at v1 is neither a folder here nor in the hub's local cache, and ", "proxy"),
        (httpx2.ReadTimeout(""), "org/tiny at v1 is neither a folder here nor in the hub's local cache, and ", "network"),
        (errors.HFValidationError("bad"), "org/tiny is no name of a model on the hub: bad", "ORG/NAME"),
    ],
)
def test_explain_tells_errors_apart(cache: Path, error: Exception, message: str, hint: str) -> None:
    explained = explain(error, NAME, "v1")
    assert explained is not None
    assert str(explained).startswith(message)
    assert hint in (explained.hint or "")


def test_explain_reads_the_cause_of_what_the_client_makes_of_it(cache: Path) -> None:
    error = errors.LocalEntryNotFoundError("nothing cached")
    error.__cause__ = httpx2.ConnectError("refused")
    assert "can't be reached: refused" in str(explain(error, NAME, None))


def test_explain_leaves_a_bug_alone(cache: Path) -> None:
    assert explain(KeyError("sha"), NAME, None) is None
