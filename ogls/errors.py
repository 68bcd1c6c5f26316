"""The errors that a user can act on: each says what is wrong, how much of it, and what to do next."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend. The CLI prints it without a traceback and exits with 2.

    No retry can heal it (but for StoreUnavailable), so tasks do not retry it.
    """


class ConfigError(UserError):
    """A configuration that cannot be used: an unknown key, a value out of range, settings at odds."""


class DataError(UserError):
    """Problems or records that cannot be used: a malformed line, a duplicate id, an answer without sense."""


class ModelError(UserError):
    """A model, tokenizer or adapter that this method cannot use, or cannot use truthfully."""


class StoreError(UserError):
    """A store that cannot be read or written, or a run that is not what the caller takes it for."""


class StoreUnavailable(StoreError):
    """A remote store that does not answer now. The one error of a user's making that a retry may heal."""


class EngineUnavailable(UserError):
    """A sampling server that does not answer now; like a store that is away, a retry may heal it."""


class RunLocked(StoreError):
    """Another live process holds the run."""


class NonFiniteLoss(UserError):
    """The loss of a rollout is not a finite number; nothing of the stage is kept."""


class HealthStop(UserError):
    """The health of a run is such that its configuration stops it."""
