"""The stages that sample and judge: prepare, sample, verify, evaluate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ogls import problems, teacher
from ogls.evaluate import loops, summarise
from ogls.policy import Policy
from ogls.records import (
    PROBLEMS,
    SCORES,
    SUMMARIES,
    TRAJECTORIES,
    VERDICTS,
    Completion,
    Problem,
    Request,
    StageResult,
)
from ogls.rollout import check_context, engine_of, requests_for
from ogls.run import Progress, Run, silent, source_digest
from ogls.schema import to_arrow
from ogls.stages.common import judge, policy_inputs, probe, sampler_at, shards
from ogls.verify import Judgement, shared
from ogls.writer import StageWriter


def prepare(run: Run, round_: int = 0, progress: Progress = silent) -> StageResult:
    """Read, clean and split the problems; write them as the run's own copy."""
    config = run.config
    sources = [config.problems.source, *(b.source for b in config.evaluate.benchmarks)]
    inputs = {
        "problems": config.problems.model_copy(update={"per_round": 1}),
        "benchmarks": config.evaluate.benchmarks,
        "prompts": config.prompts,
        "model": config.model,
        "lengths": (config.rollout.max_tokens, config.evaluate.max_tokens),
        "seed": config.seed,
        "files": [source_digest(s) for s in sources],
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        policy = run.policy()  # an unusable model or adapter is found before the first rollout
        prompter = run.prompter(policy.tokenizer)

        def too_long(problem: Problem, max_tokens: int) -> str:
            prompt = prompter.student(problem.problem)
            return check_context(config.model, policy.context, len(prompt), max_tokens)

        seen = {problems.normalised(p) for name in config.problems.after for p in _trained_on(run, name)}
        found, report = problems.prepare(config, shared(config.verify).usable, too_long, seen)
        rows = [{n: getattr(p, n) for n in PROBLEMS.schema.names} for p in found]
        writer.shard(0, to_arrow(PROBLEMS, rows))
        listed = [f"{n} {reason} ({report.words(reason)})" for reason, n in report.counts.items()]
        notice = f"left out of the problems: {'; '.join(listed)}" if listed else ""
        policy.use(run.adapter(0))
        first = next(p for p in found if p.split == "train")
        return {
            "left_out": dict(report.counts),
            "splits": dict(Counter(p.split for p in found)),
            "probe": probe(run, policy, first),
            "notice": notice,
        }

    return run.stage("problems", 0, inputs, work)


def sample(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Roll the round's groups out with the adapter that the round before has trained."""
    config = run.config
    start = run.start(round_).round
    before = run.policy_hash(start)
    inputs = {
        **policy_inputs(run),
        "problems": run.digest("problems", 0),
        "per_round": config.problems.per_round,
        "rollout": config.rollout,
        "round": round_,
        "policy": before,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        sampler, prompter = sampler_at(run, start)
        chosen = problems.round_problems(run.problems("train"), config.problems.per_round, round_, config.seed)
        requests = requests_for(chosen, prompter, config.rollout.samples, config.seed, "rollout", round_)
        for index, part in shards(requests, config.rollout.batch_size, writer, progress):
            completions = sampler.sample(part, config.rollout)
            rows = [_trajectory(r, c, sampler.hash) for r, c in zip(part, completions, strict=True)]
            tokens = sum(len(c.token_ids) for c in completions)
            truncated = sum(c.finish_reason == "length" for c in completions)
            writer.shard(index, to_arrow(TRAJECTORIES, rows), {"tokens": tokens, "truncated": truncated})
        sampler.rest()
        died = f"the engine died and was started anew ({sampler.restarts} x); only its batch was sampled again"
        notice = died if sampler.restarts else ""
        return {"policy": before, "groups": len(chosen), "engine": engine_of(config), "notice": notice}

    return run.stage("trajectories", round_, inputs, work)


def verify(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Judge every rollout of the round."""
    config = run.config.verify
    inputs = {
        "verify": config,
        "trajectories": run.digest("trajectories", round_),
        "problems": run.digest("problems", 0),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        names = ["problem_id", "sample", "text", "finish_reason"]
        rows = run.records.read("trajectories", round_, names).to_pylist()
        judged = judge(run, "train", rows, progress)
        outcomes: dict[str, set[str]] = {}
        out = []
        for row, judgement in zip(rows, judged, strict=True):
            failed = "failed" if judgement.verdict in config.failed else "undecided"
            outcome = "correct" if judgement.verdict == "correct" else failed
            outcomes.setdefault(row["problem_id"], set()).add(outcome)
            key = {"problem_id": row["problem_id"], "sample": row["sample"]}
            out.append({**key, "verdict": judgement.verdict, "outcome": outcome, "answer": judgement.answer})
        writer.shard(0, to_arrow(VERDICTS, out))
        mixed = sum({"correct", "failed"} <= o for o in outcomes.values())
        verdicts = dict(Counter(j.verdict for j in judged))
        notice = ""
        if not mixed:
            notice = (
                f"round {round_}: 0 of {len(outcomes)} groups are mixed ({verdicts.get('correct', 0)} of {len(rows)} "
                "rollouts are correct): there is no direction; raise rollout.samples, or use "
                + ("easier problems" if not verdicts.get("correct") else "harder problems")
            )
        return {"groups": len(outcomes), "mixed_groups": mixed, "verdicts": verdicts, "notice": notice}

    return run.stage("verdicts", round_, inputs, work)


def evaluate(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Sample and judge the benchmarks with the policy that the round ended with (0: the base model)."""
    config = run.config
    sampling = config.evaluate
    inputs = {
        **policy_inputs(run),
        "evaluate": sampling.model_copy(update={"benchmarks": ()}),
        "verify": config.verify,
        "problems": run.digest("problems", 0),
        "policy": run.policy_hash(round_),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        sampler, prompter = sampler_at(run, round_)
        base = run.policy() if sampling.base_kl else None
        jobs: list[tuple[str, bool, Request]] = []
        names = [*(b.name for b in sampling.benchmarks), *(["holdout"] if config.problems.holdout else [])]
        for name in names:
            posed = run.problems(name)
            drawn = requests_for(posed, prompter, sampling.samples, config.seed, "evaluate", name)
            jobs += [(name, False, r) for r in drawn] + [(name, True, r) for r in drawn if r.sample == 0]
        jobs.sort(key=lambda job: job[1])  # a shard is sampled with one temperature
        greedy = sampling.model_copy(update={"temperature": 0.0})
        for index, part in shards(jobs, sampling.batch_size, writer, progress, by=lambda job: job[1]):
            completions = sampler.sample([r for _, _, r in part], greedy if part[0][1] else sampling)
            rows = _scores(run, part, completions, sampler.hash, base)
            writer.shard(index, to_arrow(SCORES, rows), {"tokens": sum(r["n_tokens"] for r in rows)})
        sampler.rest()
        rows = [row for _, e in sorted(writer.done.items()) for row in run.records.read_shard(e).to_pylist()]
        seed = run.seed("bootstrap")
        summaries = [
            summarise([r for r in rows if r["benchmark"] == name], name, place, sampling.bootstrap, seed)
            for place, name in enumerate(names)
        ]
        writer.also(SUMMARIES, to_arrow(SUMMARIES, summaries))
        return {"policy": sampler.hash, "accuracy": {s["benchmark"]: s["accuracy"] for s in summaries}}

    return run.stage("scores", round_, inputs, work)


def _trained_on(run: Run, name: str) -> list[str]:
    """The texts of another run's training problems."""
    rows: list[dict[str, Any]] = run.records.store.run(name).read("problems", 0, ["split", "problem"]).to_pylist()
    return [row["problem"] for row in rows if row["split"] == "train"]


def _trajectory(request: Request, completion: Completion, policy: str) -> dict[str, Any]:
    return {
        "problem_id": request.problem_id,
        "sample": request.sample,
        "prompt_ids": list(request.prompt_ids),
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "n_tokens": len(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "policy": policy,
        "seed": request.seed,
    }


def _scores(
    run: Run,
    part: Sequence[tuple[str, bool, Request]],
    completions: Sequence[Completion],
    policy: str,
    base: Policy | None,
) -> list[dict[str, Any]]:
    rows = []
    under_base: list[float | None] = [None] * len(part)
    if base:
        prompts, tokens = [r.prompt_ids for _, _, r in part], [c.token_ids for c in completions]
        under_base = list(teacher.logprobs(base, prompts, tokens, run.config.teacher.batch_tokens))
    for (name, greedy, request), completion, base_logprob in zip(part, completions, under_base, strict=True):
        row = _trajectory(request, completion, policy)
        kept = ("problem_id", "sample", "n_tokens", "text", "finish_reason", "policy", "seed")
        sums = {"logprob": sum(completion.logprobs), "base_logprob": base_logprob}
        end = {"last_logprob": completion.logprobs[-1], "repeated": loops(completion.token_ids)}
        rows.append({"benchmark": name, "greedy": greedy, **sums, **end, **{n: row[n] for n in kept}})
    judged: list[Judgement] = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        judged += judge(run, name, [row for row in rows if row["benchmark"] == name])
    return [{**row, "verdict": j.verdict, "answer": j.answer} for row, j in zip(rows, judged, strict=True)]
