"""Errors that a user can fix. Each message says what is wrong, how many, and what to do next."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix. The command line prints it without a traceback and exits with code 2.

    Tasks retry it only if it is `transient`.
    """

    transient = False  # a retry may succeed without a change


class ConfigError(UserError):
    """An invalid configuration: an unknown key, a value out of range, conflicting settings."""


class DataError(UserError):
    """Problems or records that cannot be used: a malformed line, a duplicate id, an invalid answer."""


class ModelError(UserError):
    """A model, tokenizer or adapter that cannot be loaded, or for which the method is not exact."""


class StoreError(UserError):
    """A store that cannot be read or written, or a run in another state than the caller expects."""


class StoreUnavailable(StoreError):
    """A remote store does not respond."""

    transient = True


class EngineUnavailable(UserError):
    """A sampling server does not respond."""

    transient = True


class ClusterUnavailable(UserError):
    """No Ray cluster answers, or none of its workers starts."""

    transient = True


class RankDied(UserError):
    """A process of a training on several devices has ended."""

    transient = True


class RunLocked(StoreError):
    """Another live process holds the run."""


class NonFiniteLoss(UserError):
    """The loss of a rollout is NaN or infinite; the stage saves nothing."""


class HealthStop(UserError):
    """A health check with the action `stop` has failed, so the run ends."""
