"""Settings that control how a run is executed, monitored and tracked.

All settings here are operational: a run may be resumed with other values. Only a rollback (`health`) affects what is
trained next, and a resumed run reads it from the recorded decision, not from these settings.
"""

from __future__ import annotations

import os
import re
from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from ogls.config.section import Section, setting


class TokenClass(Section):
    """A named class of tokens."""

    name: str = setting("substance", "Name of the class in tables and metrics.", pattern=r"^[a-z][a-z0-9_]*$")
    pattern: str = setting(
        r"[0-9+\-*/=^<>\u00d7\u00f7\u00b7]|\\(times|cdot|div|d?frac|sqrt|pm)",
        "Regular expression. A token belongs to the class if the expression matches anywhere in the token's text.",
    )
    counts: Literal["substance", "style"] = setting(
        "substance",
        "What moves within the class counts as substance, or as style: such a class is only named, so that tables show "
        "its tokens apart.",
        later=True,
    )

    @model_serializer(mode="wrap")
    def _leave_out_the_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Classes of older runs have no `counts`, and their digests must not change."""
        values: dict[str, Any] = serialize(self)
        return {k: v for k, v in values.items() if (k, v) != ("counts", "substance")}

    @model_validator(mode="after")
    def _check_pattern(self) -> TokenClass:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"the pattern {self.pattern!r} of token class {self.name} is not a valid regular expression: {error}"
            ) from None
        if self.name == "rest":
            raise ValueError("the name rest is reserved for tokens that no pattern matches: use another name")
        return self


class StyleConfig(Section):
    """The style stage: how much of the steering and of the privilege gap is style, and how much is substance."""

    enabled: bool = setting(True, "Measure style in every round, from the cached teacher states.", operational=True)
    classes: tuple[TokenClass, ...] = setting(
        (TokenClass(),),
        "Token classes. A token belongs to the first class that matches, or else to the rest. KL within these classes "
        "counts as substance (or as counts says); KL between classes and within the rest counts as style.",
        operational=True,
        min_length=1,
    )
    rollouts: int = setting(
        64,
        "Maximum number of rollouts to measure per round, evenly spaced.",
        ge=1,
        operational=True,
    )


Action = Literal["off", "warn", "stop", "rollback"]


class HealthConfig(Section):
    """Checks after every evaluation, on the first benchmark, and the action of each check if it fails. off: no action.
    warn: log a warning. stop: end the run. rollback: continue from the adapter of the best round at a lower learning
    rate. "The base model's" values are those of round 0."""

    accuracy: Action = setting(
        "warn",
        "Action if accuracy fell: the upper end of its confidence interval is below the lower end of the best round's.",
        operational=True,
    )
    short: Action = setting(
        "warn",
        "Action if completions became short, a sign that the policy copies a terse style instead of reasoning.",
        operational=True,
    )
    min_length: float = setting(
        0.7, "short: fail if the median length is below this fraction of the base model's.", ge=0, operational=True
    )
    long: Action = setting("warn", "Action if completions became long.", operational=True)
    max_length: float = setting(
        2.0,
        "long: fail if the 95th percentile of the length is above this multiple of the base model's.",
        gt=0,
        operational=True,
    )
    repeats: Action = setting("warn", "Action if completions end in repetition loops.", operational=True)
    max_repeats: float = setting(
        0.05,
        "repeats: fail if the share of looping completions exceeds the base model's by more than this.",
        ge=0,
        operational=True,
    )
    low_entropy: Action = setting("warn", "Action if the policy's entropy collapsed.", operational=True)
    min_entropy: float = setting(
        0.05, "low_entropy: fail if the entropy is below this fraction of the base model's.", ge=0, operational=True
    )
    high_entropy: Action = setting("warn", "Action if the policy's entropy rose.", operational=True)
    max_entropy: float = setting(
        3.0, "high_entropy: fail if the entropy is above this multiple of the base model's.", gt=0, operational=True
    )
    truncated: Action = setting("warn", "Action if completions are cut off at max_tokens.", operational=True)
    max_truncated: float = setting(
        0.1,
        "truncated: fail if the share of truncated completions exceeds the base model's by more than this.",
        ge=0,
        operational=True,
    )
    stop_mass: Action = setting(
        "warn", "Action if the probability of the stop token at the end of completions fell.", operational=True
    )
    min_stop_mass: float = setting(
        0.7, "stop_mass: fail if the probability is below this fraction of the base model's.", ge=0, operational=True
    )
    kl_base: Action = setting("warn", "Action if the policy moved far from the base model.", operational=True)
    max_kl_base: float = setting(
        1.0,
        "kl_base: fail if KL(policy || base model) is above this, in nats per token. Needs evaluate.base_kl.",
        gt=0,
        operational=True,
    )
    rollbacks: int = setting(
        2, "Maximum number of rollbacks per run; the run stops instead of making another one.", ge=0, operational=True
    )
    rollback_rate: float = setting(
        0.5, "Factor that multiplies the learning rate at every rollback.", gt=0, le=1, operational=True
    )


class TrackingConfig(Section):
    """Experiment tracking with MLflow, and the run's report."""

    enabled: bool = setting(True, "Log metrics, parameters and adapters to MLflow.", operational=True)
    uri: str = setting(
        "",
        "MLflow tracking URI: a server or a database. Empty: the environment variable MLFLOW_TRACKING_URI if it is "
        "set (`ogls up` sets it for its worker), else sqlite:///data/mlflow/mlflow.db. It must not contain "
        "credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead.",
        operational=True,
    )

    @field_validator("uri")
    @classmethod
    def _check_no_credentials(cls, uri: str) -> str:
        """Reject credentials: Prefect stores flow parameters in its database."""
        if uri.startswith("http") and ("?" in uri or "@" in uri.partition("://")[2].partition("/")[0]):
            raise ValueError(
                "must not contain credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return uri

    artifacts: str = setting(
        "data/mlflow/artifacts", "Artifact folder, used if `uri` is a local database.", operational=True
    )
    experiment: str = setting("ogls-sd", "Name of the MLflow experiment.", operational=True)
    registered_model: str = setting(
        "ogls-sd-{run}",
        "Name of the registered model; each round's adapter becomes a version of it. {run} is replaced by the run's "
        "name. The best version has the alias best; the newest is models:/NAME/latest. Empty: register nothing.",
        operational=True,
        pattern=r"^[^/:]*$",
    )
    adapters: Literal["refer", "copy"] = setting(
        "refer",
        "What a version of the registered model holds. refer: the adapter's folder in the store, which therefore has "
        "to stay where it is; an MLflow server accepts URLs only, and for a store on a disk it gets a file that names "
        "the folder. copy: a copy of the adapter in MLflow's artifacts, in every round.",
        operational=True,
    )
    system_metrics: bool = setting(True, "Log CPU, memory, disk, network and GPU usage.", operational=True)
    report: Literal["tokens", "plain", "off"] = setting(
        "tokens",
        "Report written at the end of a run (see `ogls report`). tokens: with the token view of some rollouts, which "
        "runs the policies once more. plain: without it. off: no report.",
        operational=True,
    )

    @property
    def address(self) -> str:
        """The tracking URI to use in this process: `uri`, or what its description says for an empty one."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///data/mlflow/mlflow.db"


class StorageConfig(Section):
    """Retention of files on disk."""

    keep_states: int = setting(
        0,
        "Keep the teacher states of only the N newest trained rounds and delete older ones to save disk space; 0 keeps "
        "all.",
        ge=0,
        operational=True,
    )
    keep_optimizers: int = setting(
        2,
        "Keep the optimizer states of the N newest trained rounds, and those that the next round or a rollback starts "
        "from, and delete older ones; 0 keeps all. Adapters stay. `ogls check --repair` cannot train a round again "
        "whose start has no optimizer state. No other data is ever deleted.",
        ge=0,
        operational=True,
    )


class ExecutionConfig(Section):
    """Execution of stages as Prefect tasks, and the workers that compute their shards."""

    retries: int = setting(2, "Number of retries of a stage after a transient error.", ge=0, operational=True)
    retry_seconds: float = setting(
        2.0,
        "Delay before the first retry, in seconds; it doubles with every further retry. 0: no delay.",
        ge=0,
        operational=True,
    )
    other_version: Literal["accept", "refuse"] = setting(
        "accept",
        "What to do if the run was started by another version of ogls-sd. accept: log a notice and continue. refuse: "
        "raise an error. Every manifest records the version that wrote it.",
        operational=True,
    )
    timeout_seconds: float = setting(
        86400.0, "Wall-clock limit for one attempt of a stage, in seconds.", gt=0, operational=True
    )
    workers: Literal["local", "ray"] = setting(
        "local",
        "Where the shards of sample, verify, teach, steer and evaluate are computed. local: in this process, on one "
        "device. ray: by workers on a Ray cluster (needs ogls-sd[ray]); the other stages stay in this process. The "
        "results do not depend on it.",
        operational=True,
    )
    address: str = setting(
        "auto",
        "The Ray cluster. auto: the one of RAY_ADDRESS or of this machine; if none runs, a local one is started for "
        "the run. local: always start one. Else the address of its head, `host:port`.",
        operational=True,
    )
    worker_count: int = setting(
        0,
        "Number of workers. 0: as many as the nodes of the cluster have devices for, counted again while a stage runs.",
        ge=0,
        operational=True,
    )
    worker_devices: int = setting(
        0,
        "Devices of one worker: GPUs, or CPU cores (threads of torch) in a cluster or for a model without GPU. 0: "
        "rollout.vllm.tensor_parallel if vLLM samples on GPUs, else 1.",
        ge=0,
        operational=True,
    )
    sample_ahead: bool = setting(
        True,
        "Sample the rollouts of the next round beside an evaluation, so that no device waits for the longest "
        "completions of either. Only with workers on Ray, or an engine that decodes shards together. A stop "
        "or a rollback by [health] discards them.",
        operational=True,
    )
    worker_start_seconds: float = setting(
        600.0,
        "How long a stage waits for its first worker, in seconds. Longer waits for a busy cluster need a larger value.",
        gt=0,
        operational=True,
    )

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        """Reject Ray Client: the driver has to be a process of the cluster to notice that a node has died."""
        if address.startswith("ray://"):
            raise ValueError(
                "ray:// (Ray Client) is not supported: start the run on a node of the cluster, with the address "
                "host:port of its head, or as a job (`ray job submit`)"
            )
        return address

    limit: str = setting(
        "",
        "Name of a Prefect global concurrency limit. Stages that run the model wait for a slot of it, so that runs can "
        "share a GPU. `ogls up` creates ogls-gpu with one slot. On a machine with several GPUs, each has its own "
        "limit NAME-HOST-GPU. Empty: no limit.",
        operational=True,
    )
