"""How a run is watched, tracked and carried out: settings that change no result by themselves.

All are operational: a run may be resumed with others. Only a rollback (`health`) decides what is trained next, and
then by what it recorded, not by these values.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator, model_validator

from ogls.config.section import Section, setting


class TokenClass(Section):
    """A named class of tokens."""

    name: str = setting("substance", "Its name in tables and metrics.", pattern=r"^[a-z][a-z0-9_]*$")
    pattern: str = setting(
        r"[0-9+\-*/=^<>\u00d7\u00f7\u00b7]|\\(times|cdot|div|d?frac|sqrt|pm)",
        "Regular expression looked for in a token's text.",
    )

    @model_validator(mode="after")
    def _compiles(self) -> TokenClass:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"the pattern {self.pattern!r} of token class {self.name} is wrong: {error}") from None
        if self.name == "rest":
            raise ValueError("rest is the class of the tokens that no pattern matches: take another name")
        return self


class StyleConfig(Section):
    """Style against substance: which part of each round's steering and privilege gap is which."""

    enabled: bool = setting(True, "Measure it every round, from the cached states.", operational=True)
    classes: tuple[TokenClass, ...] = setting(
        (TokenClass(),),
        "Classes whose tokens are substance; the first that matches counts.",
        operational=True,
        min_length=1,
    )
    rollouts: int = setting(64, "Most rollouts of a round that are measured, evenly spread.", ge=1, operational=True)


Action = Literal["off", "warn", "stop", "rollback"]


class HealthConfig(Section):
    """What is watched after every evaluation, and what each check does when it fails.

    warn says it; stop ends the run; rollback goes on from the best round's adapter at a lower learning rate.
    """

    accuracy: Action = setting("warn", "Accuracy whose interval lies below the best round's.", operational=True)
    short: Action = setting("warn", "Completions have become short: style copied, reasoning lost.", operational=True)
    min_length: float = setting(
        0.7, "short: median length below this share of the base model's.", ge=0, operational=True
    )
    long: Action = setting("warn", "Completions have become long.", operational=True)
    max_length: float = setting(
        2.0, "long: 95th percentile of length above this multiple of the base model's.", gt=0, operational=True
    )
    repeats: Action = setting("warn", "Completions end in a loop.", operational=True)
    max_repeats: float = setting(
        0.05, "repeats: share of completions above this over the base model's.", ge=0, operational=True
    )
    low_entropy: Action = setting("warn", "The policy has become sure of everything.", operational=True)
    min_entropy: float = setting(0.05, "low_entropy: below this share of the base model's.", ge=0, operational=True)
    high_entropy: Action = setting("warn", "The policy has become unsure.", operational=True)
    max_entropy: float = setting(3.0, "high_entropy: above this multiple of the base model's.", gt=0, operational=True)
    truncated: Action = setting("warn", "Completions run into max_tokens.", operational=True)
    max_truncated: float = setting(
        0.1, "truncated: share of completions above this over the base model's.", ge=0, operational=True
    )
    stop_mass: Action = setting("warn", "The policy forgets how to stop.", operational=True)
    min_stop_mass: float = setting(0.7, "stop_mass: below this share of the base model's.", ge=0, operational=True)
    kl_base: Action = setting("warn", "The policy has left the base model.", operational=True)
    max_kl_base: float = setting(1.0, "kl_base: above this, in nats a token.", gt=0, operational=True)
    rollbacks: int = setting(2, "Most rollbacks a run; the next one is a stop.", ge=0, operational=True)
    rollback_rate: float = setting(
        0.5, "The learning rate is multiplied by this at every rollback.", gt=0, le=1, operational=True
    )


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = setting(True, "Log to MLflow.", operational=True)
    uri: str = setting("sqlite:///data/mlflow/mlflow.db", "Tracking server or database.", operational=True)

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str) -> str:
        """Prefect keeps a flow's parameters in its database; a server's credentials have a place of their own."""
        if uri.startswith("http") and ("?" in uri or "@" in uri.partition("://")[2].partition("/")[0]):
            raise ValueError("takes no password or token; put them in MLFLOW_TRACKING_USERNAME and _PASSWORD")
        return uri

    artifacts: str = setting("data/mlflow/artifacts", "Where a local database keeps artifacts.", operational=True)
    experiment: str = setting("ogls-sd", "MLflow experiment.", operational=True)
    registered_model: str = setting(
        "ogls-sd-{run}",
        "Registered model whose versions the adapters are, {run} standing for the run's name; empty for none. The best "
        "has the alias best; the newest is models:/NAME/latest.",
        operational=True,
        pattern=r"^[^/:]*$",
    )
    system_metrics: bool = setting(True, "Log CPU, memory, disk, network and GPU use.", operational=True)
    report: Literal["tokens", "plain", "off"] = setting(
        "tokens",
        "At the end of a run, write its report (ogls report): with the token view of some rollouts, for which the "
        "policies run once more; without; or not at all.",
        operational=True,
    )


class StorageConfig(Section):
    """What is kept on disk."""

    keep_states: int = setting(
        0,
        "Teacher states are kept for so many of the newest trained rounds and dropped for older ones; 0 keeps all. "
        "Nothing else is ever dropped.",
        ge=0,
        operational=True,
    )


class ExecutionConfig(Section):
    """How stages are carried out as Prefect tasks."""

    retries: int = setting(2, "Retries of a stage after an error that may heal.", ge=0, operational=True)
    retry_seconds: float = setting(2.0, "First delay before a retry; it doubles each time.", ge=0, operational=True)
    other_version: Literal["accept", "refuse"] = setting(
        "accept",
        "A run that another version of ogls-sd has begun: go on with it and say so, or refuse. Every manifest names "
        "the version that wrote it.",
        operational=True,
    )
    timeout_seconds: float = setting(86400.0, "Wall limit of one stage.", gt=0, operational=True)
    limit: str = setting(
        "",
        "Prefect's global concurrency limit that a stage which runs the model takes a place of, waiting for it; "
        "`ogls up` makes ogls-gpu with one place. Empty: none.",
        operational=True,
    )
