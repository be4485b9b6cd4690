"""What the hub's client raises, told apart: no network, a licence to accept, an unknown model, an unknown revision, a full disk."""

from __future__ import annotations

import errno

import httpx2
from huggingface_hub import constants, errors, get_token

from artifact.errors import CheckpointError

BY_HAND = "or fetch it on another machine (`hf download {repository}`) and give the folder as --checkpoint"
ROWS: tuple[tuple[type[BaseException], str, str], ...] = (
    (
        errors.OfflineModeIsEnabled,
        "{what} is neither a folder here nor in the hub's local cache, and HF_HUB_OFFLINE forbids to fetch it",
        f"unset HF_HUB_OFFLINE, {BY_HAND}",
    ),
    (errors.GatedRepoError, "{repository} is gated: {access}", "{licence}"),
    (
        errors.RevisionNotFoundError,
        "{repository} has no revision {revision}",
        "{page}/tree/main lists its branches, tags and commits; without --revision it is `main`",
    ),
    (
        errors.RepositoryNotFoundError,
        "{repository}: no such folder here, and no such model on the hub ({endpoint}), or a private one",
        "check the spelling; a private model needs `hf auth login` or HF_TOKEN",
    ),
    (errors.RemoteEntryNotFoundError, "{repository} lacks a file that it lists: {detail}", "another --revision may be whole"),
    (errors.HFValidationError, "{repository} is no name of a model on the hub: {detail}", "--checkpoint ORG/NAME, or an existing folder"),
    (
        httpx2.TransportError,
        "{what} is neither a folder here nor in the hub's local cache, and {endpoint} can't be reached: {detail}",
        f"check network and proxy, {BY_HAND}",
    ),
)
"""Error → message and hint; the first row that fits an error or one of its causes is used."""
STATUS = {
    401: ("the hub refused the token that was sent", "`hf auth login` with a valid token, or unset HF_TOKEN"),
    403: ("the token may not read {repository}", "give the token the right to read gated repositories, or use another: `hf auth login`"),
    429: ("the hub refuses more requests for now", "wait, or log in: `hf auth login`"),
}
DISK = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
BROKEN = (OSError, errors.XetDownloadError)
"""What a transfer that broke off raises, beside the rows above."""
ACCESS = {
    False: ("its licence must be accepted, and nobody is logged in", "accept the licence at {page}, then `hf auth login` or set HF_TOKEN"),
    True: ("the account of this token has no access yet", "accept the licence at {page} with that account; approval may take a while"),
}
"""By whether a token was sent."""


def explain(error: BaseException, repository: str, revision: str | None) -> CheckpointError | None:
    """The error as a user should read it; None for one that is not known."""
    chain = list(_chain(error))
    access, licence = ACCESS[get_token() is not None]
    page = f"{constants.ENDPOINT}/{repository}"
    words = {
        "repository": repository,
        "revision": revision or "main",
        "what": repository if revision is None else f"{repository} at {revision}",
        "page": page,
        "endpoint": constants.ENDPOINT,
        "access": access,
        "licence": licence.format(page=page),
        "detail": str(chain[-1]).strip().splitlines()[-1] if str(chain[-1]).strip() else type(chain[-1]).__name__,
    }
    for kind, message, hint in ROWS:
        if any(isinstance(one, kind) for one in chain):
            return CheckpointError(message.format(**words), hint=hint.format(**words))
    for answer in (one for one in chain if isinstance(one, errors.HfHubHTTPError)):
        status = answer.response.status_code
        message, hint = STATUS.get(status, (f"the hub answered {status}", "try again later"))
        return CheckpointError(f"{repository}: {message.format(**words)}", hint=hint.format(**words))
    for failure in (one for one in chain if isinstance(one, OSError) and (one.filename is not None or one.errno in DISK)):
        reason = DISK.get(failure.errno or 0, str(failure))
        return CheckpointError(f"{repository} can't be written to the hub's cache: {reason}", hint="HF_HOME names another folder for it")
    if any(isinstance(one, BROKEN) for one in chain):
        return CheckpointError(f"{repository}: the download broke off: {words['detail']}", hint="the same command goes on with the next file")
    return None


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__
    return chain
