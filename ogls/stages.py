"""Each stage as read, compute, write: what a task runs, and what a debugger calls (`ogls stage`).

    prepare -> evaluate(0), then every round:  sample -> verify -> teach -> steer -> train -> evaluate

Each takes a Run and a round, and returns a StageResult; `progress(done, total)` is called as it goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ogls import columns, problems, teacher
from ogls.errors import StoreError
from ogls.evaluate import summarise
from ogls.policy import Adapter, load_head, load_tokenizer
from ogls.records import (
    PROBLEMS,
    SCORES,
    SUMMARIES,
    TEACHER_STATES,
    TRAJECTORIES,
    UPDATES,
    VERDICTS,
    Completion,
    Problem,
    Request,
    StageResult,
    to_arrow,
)
from ogls.rollout import Sampler, check_context, make_sampler, requests_for
from ogls.run import POLICY, Progress, Run, silent, source_digest
from ogls.steering import steer as steer_tokens
from ogls.store import StageWriter
from ogls.verify import Case, Judgement, shared

T = TypeVar("T")
_STEER_ROLLOUTS = 64  # rollouts whose targets are turned into rows together


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

        found, report = problems.prepare(config, shared(config.verify).usable, too_long)
        rows = [{n: getattr(p, n) for n in PROBLEMS.schema.names} for p in found]
        writer.shard(0, to_arrow(PROBLEMS, rows))
        listed = [f"{n} {reason} ({report.words(reason)})" for reason, n in report.counts.items()]
        notice = f"left out of the problems: {'; '.join(listed)}" if listed else ""
        return {"left_out": dict(report.counts), "splits": dict(Counter(p.split for p in found)), "notice": notice}

    return run.stage("problems", 0, inputs, work)


def sample(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Roll the round's groups out with the adapter that the round before has trained."""
    config = run.config
    before = run.policy_hash(round_ - 1)
    inputs = {
        **_policy_inputs(run),
        "problems": run.digest("problems", 0),
        "per_round": config.problems.per_round,
        "rollout": config.rollout,
        "round": round_,
        "policy": before,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        sampler, prompter = _sampler(run, round_ - 1)
        chosen = problems.round_problems(run.problems("train"), config.problems.per_round, round_, config.seed)
        requests = requests_for(chosen, prompter, config.rollout.samples, config.seed, "rollout", round_)
        for index, part in _shards(requests, config.rollout.batch_size, writer, progress):
            completions = sampler.sample(part, config.rollout)
            rows = [_trajectory(r, c, sampler.hash) for r, c in zip(part, completions, strict=True)]
            tokens = sum(len(c.token_ids) for c in completions)
            truncated = sum(c.finish_reason == "length" for c in completions)
            writer.shard(index, to_arrow(TRAJECTORIES, rows), {"tokens": tokens, "truncated": truncated})
        return {"policy": before, "groups": len(chosen)}

    return run.stage("trajectories", round_, inputs, work)


def verify(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Judge every rollout of the round."""
    config = run.config.verify
    inputs = {"verify": config, "trajectories": run.digest("trajectories", round_), "problems": run.digest("problems", 0)}

    def work(writer: StageWriter) -> dict[str, Any]:
        names = ["problem_id", "sample", "text", "finish_reason"]
        rows = run.records.read("trajectories", round_, names).to_pylist()
        judged = _judge(run, "train", rows, progress)
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


def teach(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Cache averaged teacher states of every rollout to be trained, for every pool."""
    config = run.config
    inputs = {
        **_policy_inputs(run),
        "teacher": config.teacher,
        "pools": config.pools(),
        "required": config.steer.resolved().pools(),
        "chosen": (config.train.rollouts, config.train.tokens),
        "trajectories": run.digest("trajectories", round_),
        "verdicts": run.digest("verdicts", round_),
        "policy": run.policy_hash(round_ - 1),
        "before": run.digest("updates", round_ - 1) if config.teacher.weights == "ema" and round_ > 1 else None,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        policy = run.policy()
        weights = {"policy": run.adapter(round_ - 1), "teacher": _teacher(run, round_)}
        groups = _groups(run, round_)
        posed = {p.problem_id: p for p in run.problems("train")}
        planner = teacher.Planner(config, run.prompter(policy.tokenizer), policy.context)
        plans = {name: planner.group(posed[name], group) for name, group in groups.items()}
        for index, part in _shards(list(plans), config.teacher.shard_groups, writer, progress):
            scored = [s for name in part for s in plans[name].scored]
            states: dict[Any, Any] = {}
            for whose, adapter in weights.items():
                wanted = [s for s in scored if s.shares[0][0].weights == whose]
                if wanted:
                    policy.use(adapter)
                    states |= teacher.score(policy, wanted, config.teacher.batch_tokens)
            rows = [
                {
                    "problem_id": s.key[0],
                    "sample": s.key[1],
                    "pool": s.pool,
                    "exemplars": list(s.exemplars),
                    **columns.pack_states(states[s.key, s.pool], config.teacher.state_dtype),
                }
                for s in scored
            ]
            writer.shard(index, to_arrow(TEACHER_STATES, rows), {"tokens": sum(r["tokens"] for r in rows)})
        left_out: Counter[str] = sum((p.left_out for p in plans.values()), Counter())
        kept = len({s.key for p in plans.values() for s in p.scored})
        cut = sum(p.cut for p in plans.values())
        notice = f"{cut} exemplars were cut to fit (teacher.exemplar_tokens, or the model's context)" if cut else ""
        return {"rollouts": kept, "left_out": dict(left_out), "exemplars_cut": cut, "notice": notice}

    return run.stage("teacher_states", round_, inputs, work)


def steer(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Turn cached states into targets. No model runs here but the head."""
    import torch

    config = run.config
    recipe = config.steer.resolved()
    states = run.digest("teacher_states", round_)
    trajectories = run.digest("trajectories", round_)
    inputs = {
        "recipe": recipe,
        "support": config.steer.support,
        "batch_tokens": config.steer.batch_tokens,
        "model": config.model,
        "teacher_states": states,
        "trajectories": trajectories,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        head, tokenizer = load_head(config.model), load_tokenizer(config.model)
        rollouts = {r.key: r for group in _groups(run, round_).values() for r in group}
        manifest = run.records.manifest("teacher_states", round_)
        entries = manifest.of("teacher_states") if manifest else []
        for index, (entry,) in _shards(entries, 1, writer, progress):
            cached = columns.unpack_states(run.records.read_shard(entry))
            tables, sums = [], {"kl_sum": 0.0, "direction_sum": 0.0}
            for part in _chunks(list(cached), _STEER_ROLLOUTS):
                tokens = [torch.tensor(rollouts[k].token_ids[: len(cached[k]["base"])]) for k in part]
                pools = {p: torch.cat([cached[k][p] for k in part]) for p in recipe_pools(cached, part)}
                target = steer_tokens(pools, torch.cat(tokens), recipe, head, config.steer.support, config.steer.batch_tokens)
                tables.append(columns.target_rows(part, tokens, target, tokenizer))
                sums["kl_sum"] += target.kl.sum().item()
                sums["direction_sum"] += target.direction_norm.sum().item()
            writer.shard(index, columns.joined(tables), sums)
        rows = sum(entry.rows for entry in writer.done.values())
        total = {n: sum(e.metrics[n] for e in writer.done.values()) for n in ("kl_sum", "direction_sum")}
        return {"kl": total["kl_sum"] / max(rows, 1), "direction_norm": total["direction_sum"] / max(rows, 1)}

    return run.stage("targets", round_, inputs, work)


def recipe_pools(cached: dict[Any, dict[Any, Any]], part: Sequence[Any]) -> list[Any]:
    """The pools that every rollout of the part has."""
    return [p for p in cached[part[0]] if all(p in cached[k] for k in part)]


def train(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Distil the targets into the policy; write the updates, the adapter and the optimizer's state."""
    from safetensors.torch import load, save

    from ogls.train import Trainer

    config = run.config
    full = config.train.support == "full"
    before = run.policy_hash(round_ - 1)
    inputs = {
        **_policy_inputs(run),
        "train": config.train,
        "ema": config.teacher.ema_decay if config.teacher.weights == "ema" else None,
        "round": round_,
        "before": run.digest("updates", round_ - 1) if round_ > 1 else None,
        "targets": run.digest("targets", round_),
        "states": run.digest("teacher_states", round_) if full else None,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        items = _train_items(run, round_, full)
        policy = run.policy(round_ - 1)
        if policy.hash != before:
            raise StoreError(f"round {round_} was sampled by {before}, but {policy.hash} would be trained")
        state = load(run.attachment(round_ - 1, "optimizer.safetensors")) if round_ > 1 else None
        trainer = Trainer(policy, config.train, state)
        rows = trainer.round(items, run.seed("train", round_), progress)
        writer.shard(0, to_arrow(UPDATES, rows))
        trained = policy.adapter()
        for name, content in policy.files().items():
            writer.attach(POLICY, name, content)
        writer.attach(POLICY, "optimizer.safetensors", save(trainer.state()))
        if config.teacher.weights == "ema":
            old = _teacher(run, round_) or policy.initial()
            average = old.average(trained, config.teacher.ema_decay)
            writer.attach(POLICY, "ema.safetensors", save(dict(average.weights)))
        loss = sum(r["loss"] for r in rows) / len(rows) if rows else 0.0
        notice = "" if rows else f"round {round_}: nothing to train on; the adapter stays as it was"
        tokens = sum(r["tokens"] for r in rows)
        return {"policy": trained.hash, "loss": loss, "steps": len(rows), "tokens": tokens, "notice": notice}

    return run.stage("updates", round_, inputs, work)


def evaluate(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Sample and judge the benchmarks with the policy that the round ended with (0: the base model)."""
    config = run.config
    sampling = config.evaluate
    inputs = {
        **_policy_inputs(run),
        "evaluate": sampling.model_copy(update={"benchmarks": ()}),
        "verify": config.verify,
        "problems": run.digest("problems", 0),
        "policy": run.policy_hash(round_),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        sampler, prompter = _sampler(run, round_)
        jobs: list[tuple[str, bool, Request]] = []
        names = [*(b.name for b in sampling.benchmarks), *(["holdout"] if config.problems.holdout else [])]
        for name in names:
            posed = run.problems(name)
            drawn = requests_for(posed, prompter, sampling.samples, config.seed, "evaluate", name)
            jobs += [(name, False, r) for r in drawn] + [(name, True, r) for r in drawn if r.sample == 0]
        jobs.sort(key=lambda job: job[1])  # a shard is sampled with one temperature
        greedy = sampling.model_copy(update={"temperature": 0.0})
        for index, part in _shards(jobs, sampling.batch_size, writer, progress, by=lambda job: job[1]):
            completions = sampler.sample([r for _, _, r in part], greedy if part[0][1] else sampling)
            writer.shard(index, to_arrow(SCORES, _scores(run, part, completions, sampler.hash)))
        shards = [run.records.read_shard(entry).to_pylist() for _, entry in sorted(writer.done.items())]
        rows = [row for shard in shards for row in shard]
        seed = run.seed("bootstrap")
        summaries = [
            summarise([r for r in rows if r["benchmark"] == name], name, sampling.bootstrap, seed) for name in names
        ]
        writer.also(SUMMARIES, to_arrow(SUMMARIES, summaries))
        return {"policy": sampler.hash, "accuracy": {s["benchmark"]: s["accuracy"] for s in summaries}}

    return run.stage("scores", round_, inputs, work)


STAGES: dict[str, Callable[..., StageResult]] = {
    s.__name__: s for s in (prepare, sample, verify, teach, steer, train, evaluate)
}


def _policy_inputs(run: Run) -> dict[str, Any]:
    """What decides the model and its prompts, wherever one runs."""
    config = run.config
    return {"model": config.model, "adapter": config.adapter, "prompts": config.prompts, "seed": config.seed}


def _sampler(run: Run, round_: int) -> tuple[Sampler, Any]:
    """The engine, sampling from the adapter that a round ended with (its hash checked), and the prompter."""
    policy = run.policy()
    sampler = make_sampler(run.config.rollout.engine, policy)
    sampler.use(run.adapter(round_))
    if sampler.hash != (trained := run.policy_hash(round_)):
        raise StoreError(f"the engine samples from {sampler.hash}, but round {round_} trained {trained}")
    return sampler, run.prompter(policy.tokenizer)


def _groups(run: Run, round_: int) -> dict[str, Any]:
    return columns.rollouts(run.records.read("trajectories", round_), run.records.read("verdicts", round_))


def _teacher(run: Run, round_: int) -> Adapter | None:
    """The teacher's weights in a round; None for the base model."""
    kind = run.config.teacher.weights
    if kind == "frozen" or round_ == 1:
        return None
    if kind == "live":
        return run.adapter(round_ - 1)
    return Adapter.parse(run.attachment(round_ - 1, "ema.safetensors"))


def _train_items(run: Run, round_: int, full: bool) -> list[Any]:
    manifest = run.records.manifest("teacher_states", round_)
    entries = manifest.of("teacher_states") if manifest else []
    states = (run.records.read_shard(entry) for entry in entries) if full else None
    targets = run.records.read("targets", round_)
    recipe = run.config.steer.resolved()
    return columns.train_items(_groups(run, round_), targets, states, recipe, run.config.train)


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
    run: Run, part: Sequence[tuple[str, bool, Request]], completions: Sequence[Completion], policy: str
) -> list[dict[str, Any]]:
    rows = []
    for (name, greedy, request), completion in zip(part, completions, strict=True):
        row = _trajectory(request, completion, policy)
        kept = ("problem_id", "sample", "n_tokens", "text", "finish_reason", "policy", "seed")
        rows.append({"benchmark": name, "greedy": greedy, **{n: row[n] for n in kept}})
    judged: list[Judgement] = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        judged += _judge(run, name, [row for row in rows if row["benchmark"] == name])
    return [{**row, "verdict": j.verdict, "answer": j.answer} for row, j in zip(rows, judged, strict=True)]


def _judge(run: Run, split: str, rows: list[dict[str, Any]], progress: Progress = silent) -> list[Judgement]:
    expected = {p.problem_id: p.answer for p in run.problems(split)}
    cases = [Case(row["text"], row["finish_reason"], expected[row["problem_id"]]) for row in rows]
    return shared(run.config.verify).judge(cases, progress)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _shards(
    items: Sequence[T], size: int, writer: StageWriter, progress: Progress, by: Callable[[T], Any] = lambda _: None
) -> Iterator[tuple[int, Sequence[T]]]:
    """(index, items) of each shard that is not finished yet; a shard holds one value of `by` only."""
    runs: list[list[T]] = []
    for item in items:
        if not runs or len(runs[-1]) == size or by(runs[-1][-1]) != by(item):
            runs.append([])
        runs[-1].append(item)
    for index, part in enumerate(runs):
        if index not in writer.done:
            yield index, part
        progress(index + 1, len(runs))
