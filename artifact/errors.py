"""The error tree: one child a room, all of them shown to a user as `error: …` and `hint: …`.

ToolkitError
 ├─ ArtifactError         the artifact folder: missing step, foreign folder, lock, checksum
 ├─ CheckpointError       what was given as a checkpoint
 ├─ ExportError           tracing, stamping, writing weights
 ├─ FusionError           rewriting graphs
 ├─ QuantizationError     quantising graphs
 ├─ EngineError           building, reading and running plans
 ├─ ValidationError       a check that could not be carried out
 ├─ UsageError            options that don't go together (exit code 2)
 └─ ParityMismatch        ran, but the result does not match (exit code 3)

A message says what, where, expected and got, with names and shapes; a hint is the next command.
"""

from __future__ import annotations


class ToolkitError(Exception):
    """Something a user can act on.

    Args:
        message: what went wrong, where, what was expected and what was found.
        hint: the next command or action, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ArtifactError(ToolkitError):
    """The artifact folder is not what the step needs."""


class CheckpointError(ToolkitError):
    """The checkpoint can't be read, or contradicts itself."""


class ExportError(ToolkitError):
    """The model can't be traced, stamped or written."""


class FusionError(ToolkitError):
    """A graph can't be rewritten as asked."""


class QuantizationError(ToolkitError):
    """A graph can't be quantised as asked."""


class EngineError(ToolkitError):
    """A plan can't be built, read or run."""


class ValidationError(ToolkitError):
    """A check could not be carried out."""


class UsageError(ToolkitError):
    """Options that contradict each other, or one that lacks its partner."""

    exit_code = 2


class ParityMismatch(ToolkitError):
    """A step ran, but its result does not match what it must."""

    exit_code = 3
