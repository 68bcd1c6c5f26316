"""The time of a self-distillation step: OGLS-SD compared with the SDPO trainer of TRL, on the same rollouts.

    python tests/benchmarks/against_trl.py OUT     # needs TRL 1.16

One optimizer step on 256 rollouts (32 problems x 8) of the tiny world's seed model, with a LoRA adapter of rank 32. The
teacher (the base model) reads a correct rollout of the same group; reverse KL on its top 64 tokens and a tail bucket.
TRL's sampling is replaced by the same rollouts, so that neither time includes sampling.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ogls.training.items import distillation_items

sys.path[:0] = ["tests"]

from measured import write_results

STEPS, SUPPORT, RANK = 6, 64, 32
RATE = 5e-4


def time_ogls(root: str) -> list[float]:
    """Seconds of each step of OGLS-SD."""
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
    seconds = []
    for _ in range(STEPS):
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
        head = policy.head.float()
        keys = list(states)
        tokens = [torch.tensor(rollouts[k].token_ids) for k in keys]
        pools = {p: torch.cat([states[k][p] for k in keys]) for p in states[keys[0]]}
        pools["base"] = pools["correct"]  # used only for the reported KL to the base; not part of the loss
        target = steer_tokens(pools, torch.cat(tokens), recipe, head, SUPPORT)
        tables.append(columns.target_rows(keys, tokens, target, policy.tokenizer))
        items = distillation_items(groups, columns.concat_targets(tables), None, config.train)
        trainer.optimizer_step(items)
        seconds.append(time.perf_counter() - start)
    return seconds


def time_trl(root: str) -> list[float]:
    """Seconds of each training step of TRL."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from ogls.stages import columns
    from ogls.stages.run import open_run

    run = open_run(root, "drawn")
    config = run.config
    groups = columns.to_rollouts(run.records.read("trajectories", 1), run.records.read("verdicts", 1))
    problems_by_id = {p.problem_id: p for p in run.problems("train")}
    completions_by_prompt = {group[0].prompt_ids: [list(r.token_ids) for r in group] for group in groups.values()}
    correct = {tuple(r.token_ids) for group in groups.values() for r in group if r.outcome == "correct"}
    rows = [{"prompt": [{"role": "user", "content": problems_by_id[name].problem}]} for name in groups]

    def reward(prompts: Any, completions: Any, completion_ids: Any = None, **_: Any) -> list[float]:
        return [float(tuple(ids) in correct) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        settings = SDPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=len(rows) * 8,
            gradient_accumulation_steps=1,
            num_generations=8,
            max_completion_length=config.rollout.max_tokens,
            max_steps=STEPS,
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
        trainer = SDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(config.model.path),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=run.prompter(run.load_policy().tokenizer).tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(config.adapter.modules)),
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

        trainer._generate_transformers = stored_rollouts
        seconds: list[float] = []
        original_step = trainer.training_step

        def timed_step(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            out = original_step(*arguments, **keywords)
            seconds.append(time.perf_counter() - start)
            return out

        trainer.training_step = timed_step
        trainer.train()
    return seconds


def main(out: Path) -> None:
    """Measure both in separate processes, and write OUT/against_trl.md and .parquet."""
    from conftest import carry_out, small_config

    from ogls.stages.registry import STAGES

    with tempfile.TemporaryDirectory() as root:
        sdpo = ("steer.recipe=sdpo", "train.rollouts=all", "train.divergence=reverse_kl", f"steer.support={SUPPORT}")
        sizes = ("problems.per_round=32", "rollout.samples=8", "rollout.batch_size=256", "teacher.pools=[]")
        config = small_config(root, "name=drawn", *sdpo, *sizes, "train.batch_rollouts=256", "teacher.max_exemplars=1")
        run = carry_out(config, rounds=0)
        for stage in ("sample", "verify"):
            STAGES[stage](run, 1)
        seconds = {}
        for way in ("theirs", "ours", "theirs", "ours"):  # alternating, because other processes share the machine
            command = [sys.executable, __file__, "--measure", root, way]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            _warm_up, *steps = json.loads(result.stdout.splitlines()[-1])
            seconds.setdefault(way, []).extend(steps)
            print(way, seconds[way], flush=True)
    ogls, trl = (statistics.median(seconds[way]) for way in ("ours", "theirs"))
    ways = {"TRL's SDPO trainer": trl, "teacher pass, steering and training step": ogls}
    rows = [{"way": name, "seconds": time_, "share": time_ / trl} for name, time_ in ways.items()]
    table_columns = {
        "way": ("a step of self-distillation, 256 rollouts", ""),
        "seconds": ("seconds", ".2f"),
        "share": ("share", ".2f"),
    }
    write_results(out, "against_trl", rows, table_columns)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps({"ours": time_ogls, "theirs": time_trl}[sys.argv[3]](sys.argv[2])))
    else:
        main(Path(sys.argv[1]))
