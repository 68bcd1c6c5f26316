"""The Arrow schema of every table, declared once, and the small frozen types: the shared vocabulary.

Every table is partitioned by `round`, which is read from its path; queries add the column `run`. The writer
enforces these schemas, and `data/README.md` is generated from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ogls.errors import DataError

SCHEMA_VERSION = 2

Key = tuple[str, int]  # (problem_id, sample): names a rollout within its round


@dataclass(frozen=True)
class Table:
    """One table: its schema, which stage writes it, and beside which table its manifest lies."""

    name: str
    stage: str
    about: str
    schema: pa.Schema
    owner: str = ""
    float_lists: tuple[str, ...] = ()  # columns stored as byte-stream-split, which packs them best
    opaque: tuple[str, ...] = ()  # columns that only code reads: neither dictionary nor compression

    @property
    def manifest_table(self) -> str:
        """The table beside which this one's manifest lies."""
        return self.owner or self.name


def _field(name: str, type_: pa.DataType, about: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"about": about})


def _schema(*fields: pa.Field) -> pa.Schema:
    return pa.schema(fields, metadata={"ogls_schema_version": str(SCHEMA_VERSION)})


_ID = _field("problem_id", pa.string(), "Id of the problem.")
_SAMPLE = _field("sample", pa.int32(), "Number of the rollout within its group, from 0.")
_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())

PROBLEMS = Table(
    "problems",
    "prepare",
    "The problems of a run, in round 0.",
    _schema(
        _ID,
        _field("split", pa.string(), "train, or the name of a benchmark."),
        _field("problem", pa.string(), "The question."),
        _field("solution", pa.string(), "The reference solution.", nullable=True),
        _field("answer", pa.string(), "The expected answer, as math-verify is given it."),
    ),
)

TRAJECTORIES = Table(
    "trajectories",
    "sample",
    "One row a training rollout. Nobody edits it afterwards.",
    _schema(
        _ID,
        _SAMPLE,
        _field("prompt_ids", _INTS, "Token ids of the rendered student prompt."),
        _field("token_ids", _INTS, "Sampled token ids, the stop token included."),
        _field("logprobs", _FLOATS, "Log-probability (nats) of each sampled token under the policy at temperature 1."),
        _field("n_tokens", pa.int32(), "Length of token_ids."),
        _field("text", pa.string(), "The completion as text, control tokens left out."),
        _field("finish_reason", pa.string(), "stop (a stop token) or length (max_tokens reached)."),
        _field("policy", pa.string(), "Hash of the adapter that sampled; base for none."),
        _field("seed", pa.int64(), "Seed of this rollout."),
    ),
    float_lists=("prompt_ids", "token_ids", "logprobs"),
)

VERDICTS = Table(
    "verdicts",
    "verify",
    "One row a rollout: what verification made of it.",
    _schema(
        _ID,
        _SAMPLE,
        _field("verdict", pa.string(), "correct, incorrect, no_answer, truncated, timeout or error."),
        _field("outcome", pa.string(), "correct, failed (verify.failed) or undecided."),
        _field("answer", pa.string(), "The answer found in the completion.", nullable=True),
    ),
)

TEACHER_STATES = Table(
    "teacher_states",
    "teach",
    "One row a scored rollout and pool: the teacher's final hidden states, averaged over the pool's contexts.",
    _schema(
        _ID,
        _SAMPLE,
        _field("pool", pa.string(), "base, reference, correct or incorrect."),
        _field("exemplars", _INTS, "Samples of the group whose texts were the contexts; -1 is the reference."),
        _field("tokens", pa.int32(), "T: states kept, one for each of the rollout's first T tokens."),
        _field("dim", pa.int32(), "D: hidden size."),
        _field("dtype", pa.string(), "float16, bfloat16 or float32."),
        _field(
            "states", pa.large_binary(), "[T, D] row-major little-endian; state t is the one that predicts token t."
        ),
    ),
    opaque=("states",),
)

TARGETS = Table(
    "targets",
    "steer",
    "One row a distilled token: the steered target on its top-K support.",
    _schema(
        _ID,
        _SAMPLE,
        _field("position", pa.int32(), "Position in the rollout, from 0."),
        _field("token_id", pa.int32(), "The sampled token."),
        _field("token", pa.string(), "The sampled token as text."),
        _field("token_base_logprob", pa.float32(), "Its log-probability (nats) under the base pool."),
        _field("token_target_logprob", pa.float32(), "Its log-probability (nats) under the target."),
        _field("ids", _INTS, "The K likeliest tokens of the target, likeliest first."),
        _field("base_logprobs", _FLOATS, "Their log-probabilities (nats) under the base pool, rounded to fp16."),
        _field("target_logprobs", _FLOATS, "Their log-probabilities (nats) under the target, rounded to fp16."),
        _field("tail_mass", pa.float32(), "Probability of the target outside the support."),
        _field("direction_norm", pa.float32(), "L2 norm of the centred steering vector sum_p w_p z_p - z_base."),
        _field("kl", pa.float32(), "KL(target || base) in nats."),
    ),
    float_lists=("ids", "base_logprobs", "target_logprobs"),
)

UPDATES = Table(
    "updates",
    "train",
    "One row an optimizer step.",
    _schema(
        _field("step", pa.int64(), "Optimizer step, counted over the run from 1."),
        _field("epoch", pa.int32(), "Pass over the round's rollouts, from 0."),
        _field("loss", pa.float32(), "token_loss + train.tail_weight * tail_nll (rft and sft: tail_nll alone)."),
        _field("token_loss", pa.float32(), "Mean divergence (grpo: surrogate) a trained token, in nats."),
        _field("tail_nll", pa.float32(), "Mean NLL a tail token, in nats.", nullable=True),
        _field("grad_norm", pa.float32(), "L2 norm of the gradient before clipping."),
        _field("learning_rate", pa.float64(), "Rate of this step."),
        _field("rollouts", pa.int32(), "Rollouts of this step."),
        _field("tokens", pa.int32(), "Trained tokens of this step, without the tail's."),
        _field("tail_tokens", pa.int32(), "Tail tokens of this step."),
    ),
)

SCORES = Table(
    "scores",
    "evaluate",
    "One row an evaluation completion, after so many rounds (0: the base model).",
    _schema(
        _field("benchmark", pa.string(), "Name of the benchmark."),
        _ID,
        _SAMPLE,
        _field("greedy", pa.bool_(), "Drawn greedily; its sample is 0."),
        _field("verdict", pa.string(), "correct, incorrect, no_answer, truncated, timeout or error."),
        _field("answer", pa.string(), "The answer found in the completion.", nullable=True),
        _field("n_tokens", pa.int32(), "Length in tokens, the stop token included."),
        _field("finish_reason", pa.string(), "stop or length."),
        _field("logprob", pa.float32(), "Log-probability (nats) of the completion under the policy at temperature 1."),
        _field("base_logprob", pa.float32(), "The same under the base model (evaluate.base_kl).", nullable=True),
        _field("last_logprob", pa.float32(), "Log-probability (nats) of its last token: the stop token, unless cut."),
        _field("repeated", pa.bool_(), "Ends in a loop: an n-gram said four times or more, over 16 tokens or more."),
        _field("text", pa.string(), "The completion."),
        _field("policy", pa.string(), "Hash of the adapter that was evaluated; base for none."),
        _field("seed", pa.int64(), "Seed of this completion."),
    ),
)

SUMMARIES = Table(
    "summaries",
    "evaluate",
    "One row a benchmark and evaluated round.",
    _schema(
        _field("benchmark", pa.string(), "Name of the benchmark."),
        _field("place", pa.int32(), "Its place in the configuration, from 0; curves show place 0."),
        _field("problems", pa.int32(), "Problems evaluated."),
        _field("samples", pa.int32(), "k: sampled completions a problem."),
        _field("accuracy", pa.float64(), "avg@k: mean over problems of the share of correct samples."),
        _field("accuracy_low", pa.float64(), "Lower end of its 95% bootstrap interval over problems."),
        _field("accuracy_high", pa.float64(), "Upper end of it."),
        _field("greedy_accuracy", pa.float64(), "Share of problems solved greedily."),
        _field("pass_at_k", pa.float64(), "Unbiased pass@k at k = samples."),
        _field("mean_length", pa.float64(), "Mean tokens a sampled completion."),
        _field("length_p50", pa.float64(), "Median of it."),
        _field("length_p95", pa.float64(), "95th percentile of it."),
        _field("truncated", pa.float64(), "Share of sampled completions cut at max_tokens."),
        _field("repeated", pa.float64(), "Share of sampled completions that end in a loop."),
        _field("stop_mass", pa.float64(), "Mean probability of the stop token where a completion ended; 0 where cut."),
        _field("distinct_answers", pa.float64(), "Mean number of different answers a problem among its samples."),
        _field("entropy", pa.float64(), "Minus the mean log-probability of sampled tokens: nats a token."),
        _field("kl_base", pa.float64(), "KL(policy || base) estimated on the samples: nats a token.", nullable=True),
    ),
    owner="scores",
)

_RECIPE = _field("recipe", pa.string(), "Name of the recipe.")
_STRENGTH = _field("strength", pa.float64(), "Its strength; null for recipes without one.", nullable=True)

SWEEPS = Table(
    "sweeps",
    "sweep",
    "One row a recipe and strength, measured on a round's cached states (`ogls sweep`).",
    _schema(
        _RECIPE,
        _STRENGTH,
        _field("w_base", pa.float64(), "Weight of the pool base."),
        _field("w_reference", pa.float64(), "Weight of the pool reference."),
        _field("w_correct", pa.float64(), "Weight of the pool correct."),
        _field("w_incorrect", pa.float64(), "Weight of the pool incorrect."),
        _field("tokens", pa.int64(), "Tokens measured."),
        _field("kl", pa.float64(), "Mean KL(target || base) in nats a token."),
        _field("entropy", pa.float64(), "Mean entropy of the target in nats."),
        _field("moved_correct", pa.float64(), "Mean p_target - p_base of correct rollouts' tokens.", nullable=True),
        _field("moved_failed", pa.float64(), "Mean p_target - p_base of failed rollouts' tokens.", nullable=True),
        _field("auc", pa.float64(), "AUC, correct over failed, of rollouts' mean log-prob ratio.", nullable=True),
        _field("token_auc", pa.float64(), "AUC, correct over failed, of tokens' log-prob ratio.", nullable=True),
    ),
)

SWEEP_POSITIONS = Table(
    "sweep_positions",
    "sweep",
    "The same by position in the rollout.",
    _schema(
        _RECIPE,
        _STRENGTH,
        _field("position_from", pa.int32(), "First position of the bin."),
        _field("position_to", pa.int32(), "Last position of the bin."),
        _field("correct_tokens", pa.int32(), "Tokens of correct rollouts in the bin."),
        _field("failed_tokens", pa.int32(), "Tokens of failed rollouts in the bin."),
        _field("auc", pa.float64(), "AUC, correct over failed, of tokens' log-prob ratio.", nullable=True),
        _field("kl", pa.float64(), "Mean KL(target || base) in nats a token."),
    ),
    owner="sweeps",
)

SWEEP_AGREEMENT = Table(
    "sweep_agreement",
    "sweep",
    "One row a pair of recipes and strengths: how far their targets agree.",
    _schema(
        _field("a", pa.string(), "One recipe and its strength."),
        _field("b", pa.string(), "The other."),
        _field("same_top", pa.float64(), "Share of tokens at which both have the same likeliest token."),
        _field("correlation", pa.float64(), "Correlation of their log-prob ratios.", nullable=True),
    ),
    owner="sweeps",
)

STYLE = Table(
    "style",
    "style",
    "One row a signal, class of the sampled token and bin of positions: how far the signal lies from the base pool.",
    _schema(
        _field(
            "signal", pa.string(), "target, direction (base + correct - incorrect), reference (the OPSD gap), correct."
        ),
        _field("token_class", pa.string(), "Class of the sampled token: a name of style.classes, or rest."),
        _field("position_from", pa.int32(), "First position of the bin."),
        _field("position_to", pa.int32(), "Last position of the bin."),
        _field("tokens", pa.int64(), "Tokens measured."),
        _field("kl", pa.float64(), "Mean KL(signal || base) in nats a token."),
        _field("style", pa.float64(), "The part of kl that moves between classes or within the rest."),
        _field("norm", pa.float64(), "Mean L2 norm of the centred difference of the logits."),
    ),
)

HEALTH = Table(
    "health",
    "health",
    "One row a check and evaluated round.",
    _schema(
        _field("check", pa.string(), "Name of the check, as in [health]."),
        _field("value", pa.float64(), "What was found.", nullable=True),
        _field("limit", pa.float64(), "What it was held against.", nullable=True),
        _field("failed", pa.bool_(), "Whether it failed; null where the value or limit is not known.", nullable=True),
        _field("action", pa.string(), "off, warn, stop or rollback."),
    ),
)

ALL_TABLES = (
    *(PROBLEMS, TRAJECTORIES, VERDICTS, TEACHER_STATES, TARGETS, UPDATES, SCORES, SUMMARIES),
    *(STYLE, HEALTH, SWEEPS, SWEEP_POSITIONS, SWEEP_AGREEMENT),
)
TABLES = {t.name: t for t in ALL_TABLES}


def to_arrow(table: Table, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as the table's schema has them. Raises DataError naming the column that does not fit."""
    known, given = set(table.schema.names), set(rows[0]) if rows else set()
    if rows and known != given:
        raise DataError(f"{table.name}: missing {sorted(known - given)}, unknown {sorted(given - known)}")
    try:
        arrow = pa.Table.from_pylist(rows, schema=table.schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{table.name}: {error}") from None
    return enforce(table, arrow)


def enforce(table: Table, arrow: pa.Table) -> pa.Table:
    """The same data if it has the table's schema and no null where none may be; DataError otherwise."""
    if not arrow.schema.equals(table.schema):
        raise DataError(f"{table.name}: schema differs\n got: {arrow.schema}\n want: {table.schema}")
    for name in (f.name for f in table.schema if not f.nullable):
        if count := arrow[name].null_count:
            raise DataError(f"{table.name}.{name}: {count} of {len(arrow)} values are null")
    return arrow


@dataclass(frozen=True)
class Problem:
    """A problem that can be posed and judged."""

    problem_id: str
    problem: str
    answer: str
    solution: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Request:
    """One completion to sample: a rendered prompt, and the seed that decides every draw."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What a sampler returns for a request. `logprobs` are at temperature 1, in nats, one a token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Rollout:
    """A trajectory with its verdict, as the teacher and the trainer read it."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    outcome: str  # correct, failed or undecided
    logprobs: tuple[float, ...] = ()

    @property
    def key(self) -> Key:
        return self.problem_id, self.sample


@dataclass(frozen=True)
class StageResult:
    """What a stage tells its caller: small enough to cross Prefect."""

    stage: str
    round: int
    rows: int
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)
    reused: bool = False
    notice: str = ""
    redone: str = ""  # why finished work was done again
