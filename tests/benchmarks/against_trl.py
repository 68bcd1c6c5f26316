"""A step of self-distillation on the same rollouts: what is done here against TRL's SDPO trainer.

    python tests/benchmarks/against_trl.py OUT     # with TRL 1.16 installed beside it

The tiny world's seed model with LoRA of rank 32; 32 problems x 8 rollouts that the seed model drew; one optimizer
step of 256 rollouts. The teacher (the base model) reads a peer's success; reverse KL on its top 64 tokens and a tail
bucket. TRL's sampling is replaced by the same rollouts, so that neither way's time holds any.
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

from measured import publish

STEPS, SUPPORT, RANK = 6, 64, 32
RATE = 5e-4


def ours(root: str) -> list[float]:
    """Seconds of each step."""
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
    posed = {p.problem_id: p for p in run.problems("train")}
    recipe = config.steer.to_recipe()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        student = policy.copy_adapter()
        planner = exemplars.ContextPlanner(config, run.prompter(policy.tokenizer), policy.context)
        scored = [s for name, group in groups.items() for s in planner.group(posed[name], group).scored]
        policy.use_adapter(None)
        wanted = [s for s in scored if s.pool != "base"]
        states: dict[Any, dict[Any, torch.Tensor]] = {}
        for (key, pool), found in teacher.score_rollouts(policy, wanted, config.teacher.batch_tokens).items():
            states.setdefault(key, {})[pool] = found
        policy.use_adapter(student)
        rollouts = {r.key: r for group in groups.values() for r in group}
        tables = []
        head = policy.head.float()
        keys = list(states)
        tokens = [torch.tensor(rollouts[k].token_ids) for k in keys]
        pools = {p: torch.cat([states[k][p] for k in keys]) for p in states[keys[0]]}
        pools["base"] = pools["correct"]  # what the KL to the base would be measured from: no part of the loss
        target = steer_tokens(pools, torch.cat(tokens), recipe, head, SUPPORT)
        tables.append(columns.target_rows(keys, tokens, target, policy.tokenizer))
        items = distillation_items(groups, columns.concat_targets(tables), None, config.train)
        trainer.optimizer_step(items)
        seconds.append(time.perf_counter() - began)
    return seconds


def theirs(root: str) -> list[float]:
    """Seconds of each of TRL's training steps."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from ogls.stages import columns
    from ogls.stages.run import open_run

    run = open_run(root, "drawn")
    config = run.config
    groups = columns.to_rollouts(run.records.read("trajectories", 1), run.records.read("verdicts", 1))
    posed = {p.problem_id: p for p in run.problems("train")}
    drawn = {group[0].prompt_ids: [list(r.token_ids) for r in group] for group in groups.values()}
    right = {tuple(r.token_ids) for group in groups.values() for r in group if r.outcome == "correct"}
    rows = [{"prompt": [{"role": "user", "content": posed[name].problem}]} for name in groups]

    def reward(prompts: Any, completions: Any, completion_ids: Any = None, **_: Any) -> list[float]:
        return [float(tuple(ids) in right) for ids in completion_ids]

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

        def given(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            counts: dict[tuple[int, ...], int] = {}
            found = []
            for ids in prompt_ids:
                place = counts.get(tuple(ids), 0)
                counts[tuple(ids)] = place + 1
                found.append(drawn[tuple(ids)][place % 8])
            return prompt_ids, found

        trainer._generate_transformers = given
        seconds: list[float] = []
        plain = trainer.training_step

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            out = plain(*arguments, **named)
            seconds.append(time.perf_counter() - began)
            return out

        trainer.training_step = timed
        trainer.train()
    return seconds


def main(out: Path) -> None:
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
        for way in ("theirs", "ours", "theirs", "ours"):  # in turn: the machine is shared
            command = [sys.executable, __file__, "--measure", root, way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds.setdefault(way, []).extend(json.loads(done.stdout.splitlines()[-1])[1:])  # the first one warms up
            print(way, seconds[way], flush=True)
    mine, other = (statistics.median(seconds[way]) for way in ("ours", "theirs"))
    ways = {"TRL's SDPO trainer": other, "teacher pass, steering and training step": mine}
    rows = [{"way": name, "seconds": found, "share": found / other} for name, found in ways.items()]
    shown = {
        "way": ("a step of self-distillation, 256 rollouts", ""),
        "seconds": ("seconds", ".2f"),
        "share": ("share", ".2f"),
    }
    publish(out, "against_trl", rows, shown)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps({"ours": ours, "theirs": theirs}[sys.argv[3]](sys.argv[2])))
    else:
        main(Path(sys.argv[1]))
