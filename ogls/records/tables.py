"""Arrow schemas of the tables that stages write.

Every table is partitioned by `round`, which is read from the path of the file; queries add the column `run`.
`StageWriter` checks every table against its schema, and `data/README.md` is generated from the schemas.
"""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from ogls.records.diagnostics import HEALTH, STYLE, SWEEP_AGREEMENT, SWEEP_CLASSES, SWEEP_POSITIONS, SWEEPS
from ogls.records.imported import IMPORTED
from ogls.records.schema import Table, column, columns

_ID = column("problem_id", pa.string(), "Id of the problem.")
_SAMPLE = column("sample", pa.int32(), "Index of the rollout in its group, from 0.")
_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_METRICS = pa.map_(pa.string(), pa.float64())
PROBLEMS = Table(
    "problems",
    "prepare",
    "The problems of a run; all are in round 0.",
    columns(
        _ID,
        column("split", pa.string(), "train, or the name of a benchmark."),
        column("problem", pa.string(), "The question."),
        column("solution", pa.string(), "The reference solution.", nullable=True),
        column("answer", pa.string(), "The expected answer, in the form that math-verify parses."),
        column(
            "columns", pa.string(), "Further columns of the data set that pools read, as a JSON object.", nullable=True
        ),
    ),
)


TRAJECTORIES = Table(
    "trajectories",
    "sample",
    "One row per training rollout. Rows are never changed.",
    columns(
        _ID,
        _SAMPLE,
        column("prompt_ids", _INTS, "Token ids of the rendered student prompt."),
        column("token_ids", _INTS, "Sampled token ids, the stop token included."),
        column(
            "logprobs",
            _FLOATS,
            "Log-probability (nats) of each sampled token under the policy at temperature 1; empty if the rollout was "
            "imported without them.",
        ),
        column("n_tokens", pa.int32(), "Length of token_ids."),
        column("text", pa.string(), "The completion as text, without control tokens."),
        column("finish_reason", pa.string(), "stop (a stop token) or length (max_tokens reached)."),
        column(
            "policy", pa.string(), "Hash of the adapter that sampled the rollout; base for the base model; or imported."
        ),
        column("seed", pa.int64(), "Seed of this rollout; -1 if it was imported."),
    ),
    float_lists=("prompt_ids", "token_ids", "logprobs"),
)


VERDICTS = Table(
    "verdicts",
    "verify",
    "One row per rollout: its verdict.",
    columns(
        _ID,
        _SAMPLE,
        column("verdict", pa.string(), "correct, incorrect, no_answer, truncated, timeout or error."),
        column("outcome", pa.string(), "correct, failed (verify.failed) or undecided."),
        column("answer", pa.string(), "The answer found in the completion.", nullable=True),
        column("reward", pa.float64(), "The reward, if the checker gives one.", nullable=True),
        column("feedback", pa.string(), "What is wrong with the completion, if a pool reads it.", nullable=True),
    ),
)


TEACHER_STATES = Table(
    "teacher_states",
    "teach",
    "One row per scored rollout and pool: final hidden states of the teacher, averaged over the contexts of the pool.",
    columns(
        _ID,
        _SAMPLE,
        column("pool", pa.string(), "base, reference, correct, incorrect, or a pool that teacher.pools declares."),
        column(
            "exemplars",
            _INTS,
            "Sample indices of the rollouts used as contexts; -1: the reference solution, -2: a column.",
        ),
        column("tokens", pa.int32(), "T: number of states, one for each of the first T tokens of the rollout."),
        column("dim", pa.int32(), "D: hidden size."),
        column("dtype", pa.string(), "float16, bfloat16 or float32."),
        column("states", pa.large_binary(), "[T, D] row-major little-endian; state t predicts token t."),
    ),
    opaque=("states",),
)


CONTEXTS = Table(
    "contexts",
    "teach",
    "One row per scored rollout and pool: the exemplars that the teacher read. Kept when the states are dropped.",
    columns(
        _ID,
        _SAMPLE,
        column("pool", pa.string(), "base, reference, correct, incorrect, or a pool that teacher.pools declares."),
        column(
            "exemplars",
            _INTS,
            "Sample indices of the rollouts used as contexts; -1: the reference solution, -2: a column.",
        ),
    ),
    owner="teacher_states",
)


TARGETS = Table(
    "targets",
    "steer",
    "One row per distilled token: the steered target on its top-K tokens.",
    columns(
        _ID,
        _SAMPLE,
        column("position", pa.int32(), "Position in the rollout, from 0."),
        column("token_id", pa.int32(), "The sampled token."),
        column("token", pa.string(), "The sampled token as text."),
        column("token_base_logprob", pa.float32(), "Log-probability (nats) of the sampled token under the base pool."),
        column("token_target_logprob", pa.float32(), "Log-probability (nats) of the sampled token under the target."),
        column("ids", _INTS, "The K most likely tokens of the target, most likely first."),
        column("base_logprobs", _FLOATS, "Log-probabilities (nats) of `ids` under the base pool, rounded to fp16."),
        column("target_logprobs", _FLOATS, "Log-probabilities (nats) of `ids` under the target, rounded to fp16."),
        column("tail_mass", pa.float32(), "Probability mass of the target outside `ids`."),
        column(
            "direction_norm",
            pa.float32(),
            "L2 norm of the centred direction z_correct - z_incorrect; without both pools, of what the recipe adds.",
        ),
        column("kl", pa.float32(), "KL(target || base) in nats."),
        column("base_entropy", pa.float32(), "Entropy of the base pool's distribution in nats.", nullable=True),
        column("target_entropy", pa.float32(), "Entropy of the target in nats.", nullable=True),
    ),
    float_lists=("ids", "base_logprobs", "target_logprobs"),
)


STEERED = Table(
    "steered",
    "steer",
    "One row per distilled rollout: a summary of its targets.",
    columns(
        _ID,
        _SAMPLE,
        column("tokens", pa.int32(), "Distilled tokens."),
        column("kl", pa.float64(), "Mean KL(target || base) in nats per token."),
        column("kl_max", pa.float32(), "Largest KL(target || base) of a token, in nats."),
        column("kl_max_position", pa.int32(), "Position in the rollout of the token with the largest KL."),
        column("gain", pa.float64(), "Mean of log p_target - log p_base of the sampled tokens, in nats."),
        column("direction_norm", pa.float64(), "Mean L2 norm of the direction."),
        column("direction_max", pa.float32(), "Largest L2 norm of the direction."),
        column("direction_max_position", pa.int32(), "Position in the rollout of the token with the largest norm."),
        column("base_entropy", pa.float64(), "Mean entropy of the base pool in nats per token.", nullable=True),
        column("target_entropy", pa.float64(), "Mean entropy of the target in nats per token.", nullable=True),
        column(
            "first_mistake",
            pa.int32(),
            "Position of the first token whose log-prob the target lowers by train.mistake_nats; null without one.",
            nullable=True,
        ),
        column(
            "stop_base",
            pa.float64(),
            "Probability of the stop token under the base pool; null if the rollout was truncated or capped.",
            nullable=True,
        ),
        column(
            "stop_target",
            pa.float64(),
            "Probability of the stop token under the target; null if stop_base is.",
            nullable=True,
        ),
    ),
    owner="targets",
)


UPDATES = Table(
    "updates",
    "train",
    "One row per optimizer step.",
    columns(
        column("step", pa.int64(), "Number of the optimizer step in the run, from 1."),
        column("epoch", pa.int32(), "Pass over the rollouts of the round, from 0."),
        column("loss", pa.float32(), "token_loss + train.tail_weight * tail_nll (rft and sft: tail_nll alone)."),
        column("token_loss", pa.float32(), "Mean divergence (grpo: surrogate) per trained token, in nats."),
        column("tail_nll", pa.float32(), "Mean NLL per tail token, in nats.", nullable=True),
        column("grad_norm", pa.float32(), "L2 norm of the gradient before clipping."),
        column("learning_rate", pa.float64(), "Learning rate of this step."),
        column("rollouts", pa.int32(), "Rollouts of this step."),
        column("tokens", pa.int32(), "Trained tokens of this step, without tail tokens."),
        column("tail_tokens", pa.int32(), "Tail tokens of this step."),
        column(
            "metrics",
            _METRICS,
            "Metrics of the loss by name, means over the tokens of this step: `metrics['ratio']`. Null values are not "
            "finite.",
            nullable=True,
        ),
    ),
)


SCORES = Table(
    "scores",
    "evaluate",
    "One row per evaluation completion, sampled from the policy after the round (round 0: the base model).",
    columns(
        column("benchmark", pa.string(), "Name of the benchmark."),
        _ID,
        _SAMPLE,
        column("greedy", pa.bool_(), "Whether decoding was greedy; then sample is 0."),
        column("verdict", pa.string(), "correct, incorrect, no_answer, truncated, timeout or error."),
        column("answer", pa.string(), "The answer found in the completion.", nullable=True),
        column("n_tokens", pa.int32(), "Length in tokens, the stop token included."),
        column("finish_reason", pa.string(), "stop or length."),
        column("logprob", pa.float32(), "Log-probability (nats) of the completion under the policy at temperature 1."),
        column(
            "base_logprob",
            pa.float32(),
            "Log-probability (nats) of the completion under the base model (evaluate.base_kl).",
            nullable=True,
        ),
        column(
            "last_logprob", pa.float32(), "Log-probability (nats) of the last token: the stop token, unless truncated."
        ),
        column(
            "repeated",
            pa.bool_(),
            "Whether the completion ends in an n-gram repeated 4 times or more, over 16 tokens or more.",
        ),
        column("text", pa.string(), "The completion."),
        column("policy", pa.string(), "Hash of the evaluated adapter; base for the base model."),
        column("seed", pa.int64(), "Seed of this completion."),
    ),
)


SUMMARIES = Table(
    "summaries",
    "evaluate",
    "One row per benchmark and evaluated round.",
    columns(
        column("benchmark", pa.string(), "Name of the benchmark."),
        column("place", pa.int32(), "Index of the benchmark in the configuration, from 0; curves show index 0."),
        column("problems", pa.int32(), "Problems evaluated."),
        column("samples", pa.int32(), "k: sampled completions per problem."),
        column("accuracy", pa.float64(), "avg@k: mean over problems of the share of correct samples."),
        column("accuracy_low", pa.float64(), "Lower end of the 95% bootstrap interval of accuracy, over problems."),
        column("accuracy_high", pa.float64(), "Upper end of the 95% bootstrap interval of accuracy, over problems."),
        column("greedy_accuracy", pa.float64(), "Share of problems solved by greedy decoding."),
        column("pass_at_k", pa.float64(), "Unbiased pass@k at k = samples."),
        column("mean_length", pa.float64(), "Mean number of tokens per sampled completion."),
        column("length_p50", pa.float64(), "Median number of tokens per sampled completion."),
        column("length_p95", pa.float64(), "95th percentile of the number of tokens per sampled completion."),
        column("truncated", pa.float64(), "Share of sampled completions truncated at max_tokens."),
        column("repeated", pa.float64(), "Share of sampled completions that end in a loop."),
        column(
            "stop_mass", pa.float64(), "Mean probability of the stop token at the end of a completion; 0 if truncated."
        ),
        column("distinct_answers", pa.float64(), "Mean number of different answers among the samples of a problem."),
        column(
            "entropy",
            pa.float64(),
            "Minus the mean log-prob, at temperature 1, of the sampled tokens, in nats per token. It is an estimate of "
            "the policy's entropy if evaluate.temperature = 1 without cuts.",
        ),
        column(
            "kl_base",
            pa.float64(),
            "Mean of log policy - log base, at temperature 1, over the sampled tokens, in nats per token. It is an "
            "estimate of KL(policy || base) if evaluate.temperature = 1 without cuts.",
            nullable=True,
        ),
    ),
    owner="scores",
)


AHEAD = replace(TRAJECTORIES, name="ahead")  # before `sample` takes them over; no table to query
ALL_TABLES = (
    *(PROBLEMS, TRAJECTORIES, VERDICTS, TEACHER_STATES, CONTEXTS, TARGETS, STEERED, UPDATES, SCORES, SUMMARIES),
    *(STYLE, HEALTH, SWEEPS, SWEEP_POSITIONS, SWEEP_AGREEMENT, SWEEP_CLASSES, IMPORTED),
)


TABLES = {t.name: t for t in ALL_TABLES}
