"""Time and memory of a self-distillation step: OGLS-SD compared with the SDPO trainer of TRL, on the same rollouts.

    python tests/benchmarks/against_trl.py OUT [real | loop]     # needs TRL 1.16

One optimizer step on 256 rollouts (32 problems x 8) of the tiny world's seed model, with a LoRA adapter of rank 32;
with `real`, on 32 rollouts (4 problems x 8) of SmolLM2-135M after its warm-up (V = 49,152; data/models/smollm2-words,
see deployments/runs/smollm2-words.toml). The teacher (the base model) reads a correct rollout of the same group;
reverse KL on its top 64 tokens and a tail bucket. TRL's sampling is replaced by the same rollouts, so that neither time
includes sampling. TRL has all rollouts in one batch, or accumulates the gradients of four. With `loop`, whole rounds of
SmolLM2-135M: both sample their own rollouts of the same problems, verify them with math-verify, and train on them.
Memory is the peak size of the process beyond its size before the first step.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from ogls.stages.run import Run
from ogls.training.items import distillation_items

sys.path[:0] = ["tests"]

from measured import write_results

SUPPORT, RATE = 64, 5e-4
STEPS = {"tiny": 6, "real": 3, "loop": 4}  # the first one of each process is not counted
PROBLEMS = {"tiny": 32, "real": 4, "loop": 4}
PARTS = 4  # batches whose gradients TRL accumulates
NAMES = {
    "theirs": "TRL's SDPO trainer, one batch",
    "parts": f"TRL's SDPO trainer, {PARTS} batches",
    "ours": "teacher pass, steering and training step",
    "loop": "TRL's SDPO trainer with its own sampling",
    "round": "a round: sample, verify, teach, steer, train",
}
WAYS = {"tiny": ("theirs", "ours"), "real": ("theirs", "parts", "ours"), "loop": ("loop", "round")}


def size_mib() -> float:
    """The size of this process in memory."""
    return psutil.Process().memory_info().rss / 2**20


def peak_mib() -> float:
    """The largest size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def time_ogls(root: str, count: int) -> tuple[list[float], float]:
    """Seconds of each of `count` steps of OGLS-SD, and the size of the process before them in MiB."""
    from ogls.distillation import exemplars, teacher
    from ogls.distillation.steering import steer_tokens
    from ogls.stages import columns
    from ogls.stages.run import open_run
    from ogls.training.trainer import Trainer

    run = open_run(root, "drawn")
    config = run.config
    policy = run.load_policy(0)
    trainer = Trainer(policy, config.train)
    groups = columns.to_rollouts(run.records.read("trajectories", 1), run.records.read("verdicts", 1))
    problems_by_id = {p.problem_id: p for p in run.problems("train")}
    recipe = config.steer.to_recipe()
    seconds, before = [], size_mib()
    for _ in range(count):
        start = time.perf_counter()
        student = policy.copy_adapter()
        planner = exemplars.ContextPlanner(config, run.prompter(policy.tokenizer), policy.context)
        scored = [s for name, group in groups.items() for s in planner.group(problems_by_id[name], group).scored]
        policy.use_adapter(None)
        without_base = [s for s in scored if s.pool != "base"]
        states: dict[Any, dict[Any, torch.Tensor]] = {}
        for (key, pool), hidden in teacher.score_rollouts(policy, without_base, config.teacher.batch_tokens).items():
            states.setdefault(key, {})[pool] = hidden
        policy.use_adapter(student)
        rollouts = {r.key: r for group in groups.values() for r in group}
        tables = []
        head = policy.head
        keys = list(states)
        tokens = [torch.tensor(rollouts[k].token_ids) for k in keys]
        pools = {p: torch.cat([states[k][p] for k in keys]) for p in states[keys[0]]}
        pools["base"] = pools["correct"]  # used only for the reported KL to the base; not part of the loss
        target = steer_tokens(pools, torch.cat(tokens), recipe, head, SUPPORT, config.steer.batch_tokens)
        tables.append(columns.target_rows(keys, tokens, target, policy.tokenizer))
        items = distillation_items(groups, columns.concat_targets(tables), None, config.train)
        trainer.optimizer_step(items)
        seconds.append(time.perf_counter() - start)
    return seconds, before


def time_round(root: str, count: int) -> tuple[list[float], float]:
    """Seconds of each of `count` rounds of OGLS-SD in one process, and the size of the process before them in MiB."""
    from ogls.stages.kept_models import KeptModels
    from ogls.stages.registry import STAGES
    from ogls.stages.run import open_run

    given = open_run(root, "drawn").config
    config = given.model_copy(update={"rounds": count, "name": f"rounds-{time.time_ns()}"})
    models = KeptModels()
    run = Run(config, models)
    run.open()
    STAGES["prepare"](run, 0)
    run.load_policy(0)
    seconds, before = [], size_mib()
    for round_ in range(1, count + 1):
        start = time.perf_counter()
        for stage in ("sample", "verify", "teach", "steer", "train"):
            STAGES[stage](Run(config, models), round_)
        seconds.append(time.perf_counter() - start)
    return seconds, before


def time_trl(root: str, count: int, parts: int = 1, sampling: bool = False) -> tuple[list[float], float]:
    """Seconds of each of `count` training steps of TRL, and the size of the process before them in MiB.

    A step has `parts` batches. With `sampling`, TRL samples and verifies its rollouts.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from ogls.stages import columns
    from ogls.stages.run import open_run
    from ogls.verifiers.pool import Case, shared_verifier

    run = open_run(root, "drawn")
    config = run.config
    groups = columns.to_rollouts(run.records.read("trajectories", 1), run.records.read("verdicts", 1))
    problems_by_id = {p.problem_id: p for p in run.problems("train")}
    expected = {p.problem: p.answer for p in problems_by_id.values()}
    completions_by_prompt = {group[0].prompt_ids: [list(r.token_ids) for r in group] for group in groups.values()}
    correct = {tuple(r.token_ids) for group in groups.values() for r in group if r.outcome == "correct"}
    system = [{"role": "system", "content": config.prompts.system}] if config.prompts.system else []
    rows = [{"prompt": [*system, {"role": "user", "content": problems_by_id[name].problem}]} for name in groups]

    def reward(prompts: Any, completions: Any, completion_ids: Any = None, **_: Any) -> list[float]:
        if not sampling:
            return [float(tuple(ids) in correct) for ids in completion_ids]
        pairs = zip(prompts, completions, strict=True)
        cases = [Case(c[0]["content"], "stop", expected[p[-1]["content"]]) for p, c in pairs]
        return [float(j.verdict == "correct") for j in shared_verifier(config.verify).judge(cases)]

    with tempfile.TemporaryDirectory() as folder:
        settings = SDPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=len(rows) * 8 // parts,
            gradient_accumulation_steps=parts,
            num_generations=8,
            max_completion_length=config.rollout.max_tokens,
            max_steps=count,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            distillation_mode="topk_logits",
            distillation_topk=SUPPORT,
            distillation_add_tail=True,
            distillation_alpha=1.0,
            teacher_model_kind="base",
            gradient_checkpointing=False,
            logging_steps=1000,
            save_strategy="no",
            disable_tqdm=True,
            shuffle_dataset=False,
        )
        adapter = config.adapter
        lora = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.modules))
        trainer = SDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(config.model.path),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=run.prompter(run.load_policy().tokenizer).tokenizer,
            peft_config=lora,
        )

        def stored_rollouts(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            """Replaces TRL's sampling: the stored rollouts of each prompt, in order."""
            counts: dict[tuple[int, ...], int] = {}
            chosen = []
            for ids in prompt_ids:
                index = counts.get(tuple(ids), 0)
                counts[tuple(ids)] = index + 1
                chosen.append(completions_by_prompt[tuple(ids)][index % 8])
            return prompt_ids, chosen

        if not sampling:
            trainer._generate_transformers = stored_rollouts
        seconds: list[float] = []
        original_step = trainer.training_step

        def timed_step(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            out = original_step(*arguments, **keywords)
            seconds.append(time.perf_counter() - start)
            return out

        trainer.training_step = timed_step
        before = size_mib()
        trainer.train()
    return [sum(seconds[i : i + parts]) for i in range(0, len(seconds), parts)], before


def draw(root: str, world: str) -> None:
    """Sample and verify the rollouts."""
    from conftest import carry_out, small_config

    from ogls.config import load_config
    from ogls.stages.registry import STAGES

    sdpo = ("steer.recipe=sdpo", "train.rollouts=all", "train.divergence=reverse_kl", f"steer.support={SUPPORT}")
    sizes = (f"problems.per_round={PROBLEMS[world]}", "rollout.samples=8", "rollout.batch_size=256")
    own = ("name=drawn", "teacher.pools=[]", "teacher.max_exemplars=1", "train.batch_rollouts=256", "adapter.rank=32")
    settings = (*sdpo, *sizes, *own, "adapter.alpha=64")
    if world != "tiny":
        settings += ("train.micro_batch_tokens=1024",)
        settings += ("teacher.reference_exemplar=false", "evaluate.samples=1", "steer.temperature=1.0", f"root={root}")
        config = load_config("deployments/runs/smollm2-words.toml", settings)
        carry = Run(config)
        carry.open()
        STAGES["prepare"](carry, 0)
    else:
        carry = carry_out(small_config(root, *settings), rounds=0)
    for stage in ("sample", "verify"):
        STAGES[stage](carry, 1)


def main(out: Path, world: str = "tiny") -> None:
    """Measure both in separate processes, and write OUT/against_trl.md and .parquet (against_trl_real with `real`)."""
    with tempfile.TemporaryDirectory() as root:
        draw(root, world)
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, list[float]] = {}
        for way in WAYS[world] * 2:  # alternating, because other processes share the machine
            command = [sys.executable, __file__, "--measure", root, way, str(STEPS[world])]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            (_, *steps), before, peak = json.loads(result.stdout.splitlines()[-1])
            seconds.setdefault(way, []).extend(steps)
            peaks.setdefault(way, []).append(peak - before)
            print(way, seconds[way], peaks[way], flush=True)
    names, first = {way: NAMES[way] for way in WAYS[world]}, WAYS[world][0]
    time_, peak_ = ({way: statistics.median(values[way]) for way in names} for values in (seconds, peaks))
    rows = [
        {
            "way": name,
            "seconds": time_[way],
            "share": time_[way] / time_[first],
            "peak_mib": peak_[way],
            "peak_share": peak_[way] / peak_[first],
        }
        for way, name in names.items()
    ]
    table_columns = {
        "way": (f"a step of self-distillation, {PROBLEMS[world] * 8} rollouts", ""),
        "seconds": ("seconds", ".2f"),
        "share": ("share", ".2f"),
        "peak_mib": ("peak MiB", ",.0f"),
        "peak_share": ("share", ".2f"),
    }
    write_results(out, "against_trl" if world == "tiny" else f"against_trl_{world}", rows, table_columns)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        root, way, count = sys.argv[2:]
        measure = {
            "ours": time_ogls,
            "theirs": time_trl,
            "parts": partial(time_trl, parts=PARTS),
            "loop": partial(time_trl, sampling=True),
            "round": time_round,
        }
        seconds, before = measure[way](root, int(count))
        print(json.dumps([seconds, before, peak_mib()]))
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
