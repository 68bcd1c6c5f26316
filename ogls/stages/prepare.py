"""The stage `prepare`: read, clean and split the problems."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ogls.models.adapter import adapter_files
from ogls.problems.load import normalize_text
from ogls.problems.splits import split_problems
from ogls.progress import Progress, no_progress
from ogls.records import PROBLEMS, Problem, StageResult
from ogls.records.schema import to_arrow
from ogls.samplers.requests import check_context
from ogls.stages.engine import check_engine, record_probe
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.heads import check_teachers
from ogls.stages.imported import imported_problems
from ogls.stages.run import POLICY, Run
from ogls.store.writer import StageWriter
from ogls.training.choose import try_loss
from ogls.training.ranks import count_ranks
from ogls.training.trainer import require_trainable
from ogls.verifiers.pool import shared_verifier


def prepare(run: Run, round_: int = 0, progress: Progress = no_progress) -> StageResult:
    """Read, clean and split the problems, and store a copy of them in the run.

    The training problems of a run with imported rollouts are theirs.
    """
    config = run.config
    inputs = {
        **policy_inputs(run),
        "problems": run.identity.problems.model_copy(update={"per_round": 1}),
        "benchmarks": run.identity.evaluate.benchmarks,
        "verify": run.identity.verify,
        "lengths": (config.rollout.max_tokens, config.evaluate.max_tokens),
        **({"columns": config.columns()} if config.columns() else {}),
        **({"imported": config.rollout.imported} if config.rollout.imported else {}),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        if config.rounds:
            require_trainable(config.model.dtype)
            count_ranks(config)
        policy = run.load_policy()  # detect an unusable model, adapter or engine before the first rollout
        check_engine(run, policy)
        check_teachers(config, policy.tokenizer)
        if config.rounds:
            try_loss(config.train, policy.head)
        prompter = run.prompter(policy.tokenizer)

        def too_long(problem: Problem, max_tokens: int) -> str:
            prompt = prompter.student(problem.problem)
            return check_context(config.model, policy.context, len(prompt), max_tokens)

        seen = {normalize_text(p) for name in config.problems.after for p in _trained_on(run, name)}
        can_verify = shared_verifier(config.verify).can_verify
        problems, report = split_problems(config, can_verify, too_long, seen, imported_problems(run))
        rows = [{n: getattr(p, n) for n in PROBLEMS.schema.names} for p in problems]
        rows = [{**row, "columns": json.dumps(row["columns"]) if row["columns"] else None} for row in rows]
        writer.write_shard(0, to_arrow(PROBLEMS, rows))
        listed = [f"{n} {reason} ({report.describe(reason)})" for reason, n in report.counts.items()]
        notices = [f"problems excluded: {'; '.join(listed)}"] if listed else []
        if config.rollout.imported:
            notices.append("the training problems are those of the imported rollouts; problems.source is not read")
        if config.train.objective == "sft":
            notices += _cut_solutions(problems, policy.tokenizer, config.rollout.max_tokens)
        start = run.load_adapter(0)
        policy.use_adapter(start)
        if start:  # a copy, so that the run does not depend on another folder
            for name, content in adapter_files(start, config.model, config.adapter).items():
                writer.attach_file(POLICY, name, content)
        probe = record_probe(run, policy, [p for p in problems if p.split == "train"])
        run.release_memory()
        return {
            "left_out": dict(report.counts),
            "control_tokens": prompter.control_tokens,
            "splits": dict(Counter(p.split for p in problems)),
            "probe": probe,
            "notice": "; ".join(notices),
        }

    return run.carry_out("problems", 0, inputs, work)


def _cut_solutions(problems: Sequence[Problem], tokenizer: Any, max_tokens: int) -> Iterator[str]:
    """A notice if SFT has to cut reference solutions, which then teach no end."""
    solutions = [p.solution for p in problems if p.split == "train" and p.solution]
    cut = sum(len(tokenizer(s, add_special_tokens=False)["input_ids"]) >= max_tokens for s in solutions)
    if cut:
        yield (
            f"{cut} of {len(solutions)} reference solutions do not fit into rollout.max_tokens = {max_tokens}, and are "
            "cut there without a stop token; raise it in a new run"
        )


def _trained_on(run: Run, name: str) -> list[str]:
    """The texts of the training problems of another run."""
    rows: list[dict[str, Any]] = run.store.run(name).read("problems", 0, ["split", "problem"]).to_pylist()
    return [row["problem"] for row in rows if row["split"] == "train"]
