"""Every error that fastff raises on purpose derives from FastffError."""


class FastffError(Exception):
    """Base of all fastff errors."""


class ShapeError(FastffError, ValueError):
    """A size, dtype or device that does not fit; the message names the value seen and the one expected."""


class BackendUnavailable(FastffError, RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class CheckpointError(FastffError, ValueError):
    """A checkpoint with a missing, extra, misshapen or unreadable tensor, or of an unknown layout."""


class TrainingError(FastffError, RuntimeError):
    """Training cannot start or go on: unusable text, settings that do not fit, a loss not finite, a full disk."""


class FileError(CheckpointError, TrainingError):
    """A file is missing or damaged, belongs to another run, or cannot be written; the message names it and says what to
    do."""
