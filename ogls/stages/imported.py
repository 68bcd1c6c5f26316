"""Imported rollouts: round 1 of a run from completions that exist, in place of sampling it.

`ogls import` writes the table imported, which is the run's own copy of what was read. From it, `prepare` takes the
training problems, `sample` the trajectories of round 1, and `verify` the labels. So these stages are done, damaged,
redone and restored like those of any other run. Later rounds are sampled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ogls.config.fingerprint import fingerprint
from ogls.errors import DataError, StoreError
from ogls.models.load import load_stop_ids, load_tokenizer
from ogls.problems.load import Exclusions
from ogls.progress import Progress, no_progress
from ogls.records import TRAJECTORIES, Problem, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.run import Run
from ogls.stages.shards import divide
from ogls.store.writer import StageWriter
from ogls.verifiers.pool import Judgement

if TYPE_CHECKING:
    import pyarrow as pa

ROUND = 1  # the round that imported rollouts make
POLICY_NAME = "imported"  # stands in trajectories for the hash of the adapter that sampled


def rollouts_digest(rows: pa.Table) -> str:
    """The digest of a table imported, for `rollout.imported`. It depends on what was read and not on its source."""
    return fingerprint("imported", rows.to_pylist())


def store_imported(run: Run, rows: pa.Table, report: Exclusions, source: str) -> StageResult:
    """The stage `import`: write the table imported; `report` has the lines of `source` that were left out."""

    def work(writer: StageWriter) -> dict[str, Any]:
        writer.write_shard(0, rows)
        return {"source": source, "left_out": dict(report.counts), "lines": report.named}

    return run.carry_out("imported", ROUND, {"imported": run.config.rollout.imported}, work)


def is_imported(run: Run, round_: int) -> bool:
    """Whether the rollouts of a round were imported."""
    return round_ == ROUND and bool(run.config.rollout.imported)


def read_imported(run: Run) -> list[dict[str, Any]]:
    """The rows of the table imported. Raises StoreError if they are missing or are not those of the configuration."""
    name, problem = run.config.name, ""
    if run.records.manifest("imported", ROUND) is None:
        problem = "are missing"
    else:
        rows = run.records.read("imported", ROUND)
        if rollouts_digest(rows) == run.config.rollout.imported:
            return rows.to_pylist()
        problem = "are not those that the run was started with"
    raise StoreError(f"the imported rollouts of run {name} {problem}; `ogls import` of the same file restores them")


def imported_problems(run: Run) -> list[Problem] | None:
    """The training problems of a run with imported rollouts, in their order; None for any other run."""
    if not run.config.rollout.imported:
        return None
    problems: dict[str, Problem] = {}
    for row in read_imported(run):
        key = row["problem_id"]
        further = json.loads(row["columns"] or "{}")
        problems.setdefault(key, Problem(key, row["problem"], row["expected"], row["solution"], columns=further))
    return list(problems.values())


def make_trajectories(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """The stage `sample` of an imported round: tokenize the completions, and write the table trajectories.

    Completions of problems that `prepare` left out, and those longer than rollout.max_tokens, are left out.
    """
    config = run.config
    inputs = {
        **policy_inputs(run),
        "imported": config.rollout.imported,
        "problems": run.digest("problems", 0),
        "max_tokens": config.rollout.max_tokens,
        "round": round_,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        report = Exclusions()
        rows = _trajectories(run, report)
        listed = "; ".join(f"{n} {reason} ({report.describe(reason)})" for reason, n in report.counts.items())
        if not rows:
            raise DataError(f"run {config.name}: none of the imported completions is usable: {listed}")
        shards = divide(rows, config.rollout.batch_size)
        writer.divide(config.rollout.batch_size)
        for shard in shards:
            counts = {
                "tokens": sum(r["n_tokens"] for r in shard.items),
                "truncated": sum(r["finish_reason"] == "length" for r in shard.items),
            }
            writer.write_shard(shard.index, to_arrow(TRAJECTORIES, list(shard.items)), counts)
            progress(shard.index + 1, len(shards))
        return {
            "policy": POLICY_NAME,
            "groups": len({r["problem_id"] for r in rows}),
            "engine": POLICY_NAME,
            "left_out": dict(report.counts),
            "notice": f"completions left out: {listed}" if listed else "",
        }

    return run.carry_out("trajectories", round_, inputs, work)


def _trajectories(run: Run, report: Exclusions) -> list[dict[str, Any]]:
    """Rows of the table trajectories from the table imported."""
    tokenizer = load_tokenizer(run.config.model)
    prompter, stops = run.prompter(tokenizer), load_stop_ids(run.config.model, tokenizer)
    prompts = {p.problem_id: prompter.student(p.problem) for p in run.problems("train")}
    rows = []
    for row in read_imported(run):
        if row["problem_id"] not in prompts:
            report.add("of problems that are not in the training split", f"line {row['line']}")
            continue
        try:
            ids = _token_ids(row, tokenizer, stops)
        except ValueError as error:
            report.add("with token ids of another tokenizer", f"line {row['line']} ({error})")
            continue
        if len(ids) > run.config.rollout.max_tokens:
            report.add("longer than rollout.max_tokens", f"line {row['line']} ({len(ids)} tokens)")
            continue
        rows.append(
            {
                "problem_id": row["problem_id"],
                "sample": row["sample"],
                "prompt_ids": prompts[row["problem_id"]],
                "token_ids": ids,
                "logprobs": row["logprobs"] if len(row["logprobs"]) == len(ids) else [],
                "n_tokens": len(ids),
                "text": row["text"],
                "finish_reason": "stop" if ids[-1] in stops else "length",
                "policy": POLICY_NAME,
                "seed": -1,
            }
        )
    return rows


def _token_ids(row: dict[str, Any], tokenizer: Any, stops: Sequence[int]) -> list[int]:
    """The token ids of a completion, with the stop token unless it was truncated.

    Raises ValueError if the source has token ids that are not its text. A control token that the text spells stays
    text.
    """
    ids = row["token_ids"]
    if not ids:
        ids = tokenizer(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    elif max(ids) >= len(tokenizer) or tokenizer.decode(ids, skip_special_tokens=True) != row["text"]:
        raise ValueError("they do not spell the completion")
    ended = row["finish_reason"] == "length" or ids[-1] in stops
    return [*ids] if ended else [*ids, tokenizer.eos_token_id]


def apply_labels(
    run: Run, rows: Sequence[dict[str, Any]], judgements: Sequence[Judgement]
) -> tuple[list[Judgement], str]:
    """The verdicts of an imported round: the labels of the source, and the verifier's where it has none.

    Also returns which labels the verifier does not agree with, as a notice.
    """
    labels = {(r["problem_id"], r["sample"]): r["correct"] for r in read_imported(run) if r["correct"] is not None}
    expected = {p.problem_id: p.answer for p in run.problems("train")}
    decided, differing = [], Exclusions()
    for row, judgement in zip(rows, judgements, strict=True):
        label = labels.get((row["problem_id"], row["sample"]))
        if label is None or label == (judgement.verdict == "correct"):
            undecided = label is False and judgement.verdict in ("timeout", "error")
            decided.append(replace(judgement, verdict="incorrect") if undecided else judgement)
            continue
        decided.append(Judgement("correct" if label else "incorrect", judgement.answer, judgement.raised))
        found = f"{judgement.verdict}: {str(judgement.answer)[:20]!r} for {expected[row['problem_id']][:20]!r}"
        differing.add(
            f"labelled {'correct' if label else 'wrong'}", f"{row['problem_id']} sample {row['sample']} ({found})"
        )
    counts = [f"{n} {reason}: {differing.describe(reason)}" for reason, n in sorted(differing.counts.items())]
    total = sum(differing.counts.values())
    notice = f"the verifier does not agree with {total} of {len(labels)} labels, which are kept: {'; '.join(counts)}"
    return decided, notice if total else ""


def left_out_of_training(run: Run) -> str:
    """Why no group of the imported round can be trained on; an empty string if one can."""
    from ogls.stages.groups import read_groups
    from ogls.stages.teach import context_planner

    config, groups = run.config, read_groups(run, ROUND)
    problems = {p.problem_id: p for p in run.problems("train")}
    outcomes = [Counter(r.outcome for r in group) for group in groups.values()]
    if config.train.objective == "rft":
        return "" if any(o["correct"] for o in outcomes) else "rft needs a correct completion"
    if config.train.objective == "sft":
        return "" if any(problems[name].solution for name in groups) else "sft needs a problem with a solution"
    if config.train.objective == "grpo":
        mixed = any(o["correct"] and o["failed"] for o in outcomes)
        return "" if mixed else "grpo needs a problem with at least one correct and one failed completion"
    planner = context_planner(run)
    left_out: Counter[str] = Counter()
    for name, group in groups.items():
        plan = planner.group(problems[name], group)
        if plan.scored:
            return ""
        left_out += plan.left_out
    listed = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    return (
        f"{config.method} needs a problem with at least one correct and one failed completion, and for each completion "
        f"that is trained on the exemplars of its recipe (left out: {listed})"
    )
