"""A hub on this machine: what the real one answers, spoken to by the real client."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)(?:/revision/(?P<revision>[^?]+))?")
RESOLVE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Model:
    """A repository; ``gated`` is the status that its files are refused with, ``sizes`` what the listing says instead of the truth."""

    files: dict[str, bytes]
    commit: str = COMMIT
    gated: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news for the stderr of a test."""


class FakeHub:
    """Serves models, and remembers what it was asked for: ``GET file`` or ``HEAD file`` or ``API repository``."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.asked: list[str] = []
        self.status: int | None = None
        self.tokens: set[str | None] = set()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, repository: str, folder: Path, **options: Any) -> Model:
        """Publish the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.models[repository] = Model(files, **options)
        return self.models[repository]

    def downloads(self) -> list[str]:
        """Files whose content was fetched."""
        return sorted(line.removeprefix("GET ") for line in self.asked if line.startswith("GET "))

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self, *, body: bool) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        api, resolve = API.fullmatch(self.path.partition("?")[0]), RESOLVE.fullmatch(self.path)
        match = api or resolve
        assert match, self.path
        self.hub.asked.append(f"API {match['repository']}" if api else f"{self.command} {match['file']}")
        model = self.hub.models.get(match["repository"])
        refusal = self.refusal(model, match["revision"], "" if api else match["file"])
        if refusal or model is None:
            status, code = refusal or (401, "RepoNotFound")
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}, body)
        elif api:
            self.send(200, json.dumps(listing(match["repository"], model)).encode(), {"Content-Type": "application/json"}, body)
        else:
            content = model.files[match["file"]]
            self.send(200, content, {"X-Repo-Commit": model.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, body)

    def refusal(self, model: Model | None, revision: str | None, file: str) -> tuple[int, str] | None:
        """Status and error code of what is not given; a gated model's listing is public, its files are not."""
        if self.hub.status:
            return self.hub.status, ""
        if model is not None and revision not in (None, "main", model.commit):
            return 404, "RevisionNotFound"
        if model is not None and file and model.gated:
            return model.gated, "GatedRepo"
        return (model.refused[file], "") if model is not None and file in model.refused else None

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def listing(repository: str, model: Model) -> dict[str, Any]:
    files = [
        {"rfilename": name, "size": model.sizes.get(name, len(content)), "blobId": hashlib.sha1(content).hexdigest()}
        for name, content in model.files.items()
    ]
    return {"_id": "0", "id": repository, "modelId": repository, "sha": model.commit, "siblings": files, "tags": [], "downloads": 0}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """A hub that can be reached, and nobody logged in."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, fake.endpoint))
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    huggingface_hub.close_session()
    yield fake
    huggingface_hub.close_session()
    fake.stop()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub, and no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def sharded(write_folder: Callable[..., Path]) -> Path:
    """A model of two shards, with all that a published repository holds beside them."""
    folder = write_folder(shards=2)
    extras = ("pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "README.md", "LICENSE.txt", ".gitattributes")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", *extras):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def put_in_cache(cache: Path) -> Callable[..., Path]:
    """``put_in_cache(repository, folder, leave_out=…)``: a snapshot as the hub's tools lay it out, blobs and links; its folder."""

    def put(repository: str, folder: Path, leave_out: tuple[str, ...] = (), commit: str = COMMIT, reference: str | None = "main") -> Path:
        model = cache / f"models--{repository.replace('/', '--')}"
        snapshot = model / "snapshots" / commit
        for part in (snapshot, model / "blobs", model / "refs"):
            part.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_file() and path.name not in leave_out:
                blob = hashlib.sha256(path.read_bytes()).hexdigest()
                (model / "blobs" / blob).write_bytes(path.read_bytes())
                (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
        if reference:
            (model / "refs" / reference).write_text(commit)
        return snapshot

    return put
