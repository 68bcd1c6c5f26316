"""What the difference of two pools consists of, by the number and the kind of their exemplars. No training.

    python tests/benchmarks/exemplars.py OUT NAME CONFIG [--fewest N] [--groups G] [section.key=value ...]

Reads round 1 of a run that has sampled (or imported) and verified its rollouts, runs the teacher once for every pair of
a rollout and an exemplar of its group, and steers (lambda 1) with pools that are put together afterwards:

- `hash`, `nearest`: at most 1, 2, 4 and 8 exemplars a pool, as `teacher.pools.choose` takes them;
- `steps`: exemplars cut to their calculations and the answer;
- `shrunk`: the direction times the part of its squared size that the spread over exemplars does not explain, one factor
  a token, max(0, 1 - noise / signal), both weighted by the base's probabilities;
- `shrunk by token`: the same factor for each logit by itself;
- `same outcome`: both pools have the same outcome, so that nothing but wording (and chance) is left in the difference;
- `correct pool alone` (SDPO's target) and `reference pool alone` (OPSD's), for comparison: no direction.

For each: KL to the base and style's share of it, the same of the target that `steer.project` keeps, the AUC of the mean
log-prob ratio within groups (all tokens; digits), and how much of the probability that the target gains goes to tokens
that stand in its correct exemplars, in its failed ones, in both or in neither. A second table has the AUC by finer
classes of tokens, and a third by place in the rollout.

Only rollouts with at least N others of each outcome are measured (`--fewest`), the same in every row of up to N
exemplars, and the first G groups that have some. Rows with more exemplars, or of one outcome, have the rollouts that
have them. Writes OUT/exemplars_NAME{,_classes,_places}.parquet and .md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = ["tests"]

from exemplar_pools import FINER, Variant, direction, finer_classes, gains, pair_of_pools, steps_of, variants
from measured import write_results

from ogls.config import RunConfig, load_config
from ogls.distillation.exemplars import REFERENCE, Context, ContextPlanner, ScoredRollout
from ogls.distillation.steering import project_substance
from ogls.distillation.style import classify, split_kl, substance_only
from ogls.distillation.sweep import SweepTokens
from ogls.distillation.teacher import score_rollouts
from ogls.models.head import head_logits
from ogls.models.load import load_tokenizer
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Problem, Rollout
from ogls.stages.groups import read_groups
from ogls.stages.run import Run
from ogls.stages.teach import context_planner

PLACES = 4


@dataclass
class Measured:
    """The tokens that a variant was measured on: one array a rollout in each list of `values`."""

    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    rollouts: list[tuple[str, Rollout, np.ndarray, np.ndarray]] = field(default_factory=list)  # finer, coarse classes

    def add(self, problem: str, rollout: Rollout, finer: np.ndarray, coarse: np.ndarray, **values: Any) -> None:
        """Add the tokens of one rollout."""
        self.rollouts.append((problem, rollout, finer, coarse))
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.numpy())

    def tokens(self, finer: bool = False) -> SweepTokens:
        """What the tokens are, in the order of `values`."""
        sizes = [len(c) for _, _, _, c in self.rollouts]
        groups = {name: i for i, name in enumerate(dict.fromkeys(p for p, *_ in self.rollouts))}

        def repeat(values: list[Any]) -> np.ndarray:
            return np.repeat(np.array(values), sizes)

        return SweepTokens(
            rollout=repeat(list(range(len(sizes)))),
            position=np.concatenate([np.arange(n) * PLACES // n for n in sizes]),
            correct=repeat([r.outcome == "correct" for _, r, *_ in self.rollouts]),
            token_class=np.concatenate([f if finer else c for _, _, f, c in self.rollouts]),
            group=repeat([groups[p] for p, *_ in self.rollouts]),
        )

    def mean(self, name: str) -> float:
        """The mean over all tokens."""
        return float(np.concatenate(self.values[name]).mean())


class Experiment:
    """The model, and what was measured so far."""

    def __init__(self, config: RunConfig, fewest: int):
        self.config, self.fewest = config, fewest
        self.policy = Policy(config.model, None)
        tokenizer = load_tokenizer(config.model)
        self.prompter = Prompter(tokenizer, config.prompts, config.model.thinking)
        self.head = self.policy.head
        self.coarse = classify(tokenizer, len(self.head), config.style.classes)
        self.substance = substance_only(self.coarse, config.style.classes)
        self.texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.variants = variants(fewest)
        self.measured = {v: Measured() for v in self.variants}

    def measure(self, problem: Problem, group: Sequence[Rollout], planners: Mapping[str, ContextPlanner]) -> bool:
        """Measure every rollout of a group that has enough others; return whether there is one."""
        by_outcome = {o: [r for r in group if r.outcome == o] for o in ("correct", "failed")}
        chosen = [
            r
            for outcome, rollouts in by_outcome.items()
            for r in rollouts
            if all(len(rs) - (o == outcome) >= self.fewest for o, rs in by_outcome.items())
        ]
        if not chosen:
            return False
        exemplars = [r for rs in by_outcome.values() for r in rs]
        states = self._states(problem, chosen, exemplars)
        decided = [r.sample for r in exemplars]
        order = {name: planner.choose(problem, group) for name, planner in planners.items()}
        for rollout in chosen:
            own = {
                text: {s: states[rollout.key, f"{text}/{s}"] for s in samples}
                for text, samples in (("whole", [*decided, REFERENCE]), ("steps", decided))
            }
            pools = {name: chosen_by[rollout.key] for name, chosen_by in order.items()}
            self._measure_rollout(problem, rollout, states[rollout.key, "base"], own, pools)
        return True

    def _states(self, problem: Problem, rollouts: Sequence[Rollout], exemplars: Sequence[Rollout]) -> dict[Any, Any]:
        """The states of every rollout after every exemplar, whole and cut to its steps, and after none."""
        contexts = {"base": self.prompter.student(problem.problem)}
        for e in exemplars:
            contexts[f"whole/{e.sample}"] = self.prompter.teacher(problem.problem, e.text)
            contexts[f"steps/{e.sample}"] = self.prompter.teacher(problem.problem, steps_of(e.text))
        contexts[f"whole/{REFERENCE}"] = self.prompter.teacher(problem.problem, problem.solution or "", reference=True)
        scored = [
            ScoredRollout(r.key, name, r.token_ids, ((Context("frozen", tuple(ids)), 1.0),), ())
            for r in rollouts
            for name, ids in contexts.items()
        ]
        return score_rollouts(self.policy, scored, self.config.teacher.batch_tokens)

    def _measure_rollout(
        self, problem: Problem, rollout: Rollout, base_states: Any, own: Mapping[str, Any], pools: Mapping[str, Any]
    ) -> None:
        ids = torch.tensor(rollout.token_ids)
        finer = finer_classes(problem, [self.texts[i] for i in rollout.token_ids])
        base = head_logits(base_states, self.head).log_softmax(-1)
        for variant in self.variants:
            both = pair_of_pools(variant, pools[variant.choose], rollout, self.fewest)
            if both is None or (variant.alone == "reference" and not problem.solution):
                continue
            correct, failed = ([own[variant.text][e.sample] for e in pool] for pool in both)
            if variant.alone:
                states = own["whole"][REFERENCE] if variant.alone == "reference" else torch.stack(correct).mean(0)
                target = head_logits(states, self.head).log_softmax(-1)
            else:
                target = (base + direction(variant, base, correct, failed, self.head)).log_softmax(-1)
            projected = project_substance(target, base, self.substance)
            kl, style = split_kl(target, base, self.substance)
            token = ids[:, None]
            before = base.gather(-1, token)[:, 0]
            self.measured[variant].add(
                problem.problem_id,
                rollout,
                finer,
                self.coarse[ids].numpy(),
                kl=kl,
                style=style,
                ratio=target.gather(-1, token)[:, 0] - before,
                projected_ratio=projected.gather(-1, token)[:, 0] - before,
                **gains(target.exp() - base.exp(), *({i for e in pool for i in e.token_ids} for pool in both)),
            )

    def tables(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The rows of the three tables."""
        yield "", [row for v, m in self.measured.items() if m.rollouts for row in [self._row(v, m)]]
        common = [v for v in self.variants if v.name == "hash" and v.exemplars <= max(self.fewest, 2)]
        measured = self.measured[max(common, key=lambda v: v.exemplars)]
        ratio = np.concatenate(measured.values["ratio"])
        kl, style = (np.concatenate(measured.values[name]) for name in ("kl", "style"))

        def rows(tokens: SweepTokens, values: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
            return [
                {
                    "name": name,
                    "tokens": int((values == n).sum()),
                    "kl": float(kl[values == n].mean()),
                    "style_share": float(style[values == n].sum() / kl[values == n].sum()),
                    **tokens.auc_of_means(ratio, values == n),
                }
                for n, name in enumerate(names)
                if (values == n).any()
            ]

        finer, coarse = measured.tokens(finer=True), measured.tokens()
        yield "_classes", rows(finer, finer.token_class, [name for name, _ in FINER])
        places = [f"{a:.0%} to {b:.0%}" for a, b in pairwise(np.linspace(0, 1, PLACES + 1))]
        yield "_places", rows(coarse, coarse.position, places)

    def _row(self, variant: Variant, m: Measured) -> dict[str, Any]:
        tokens = m.tokens()
        ratio, projected = (np.concatenate(m.values[name]) for name in ("ratio", "projected_ratio"))
        everything = np.ones(len(ratio))
        digits = tokens.token_class == 1
        digit_auc = tokens.auc_of_means(ratio, digits)["group_auc"] if digits.any() else None
        gains = {name: m.mean(name) for name in ("gain_correct", "gain_failed", "gain_both", "gain_neither")}
        return {
            "exemplars": variant.exemplars,
            "kind": variant.name,
            "rollouts": len(m.rollouts),
            "groups": len({p for p, *_ in m.rollouts}),
            "tokens": len(ratio),
            "kl": m.mean("kl"),
            "style_share": m.mean("style") / m.mean("kl") if m.mean("kl") else None,
            "substance_kl": m.mean("kl") - m.mean("style"),
            **tokens.auc_of_means(ratio, everything),
            "digit_auc": digit_auc,
            "projected_auc": tokens.auc_of_means(projected, everything)["group_auc"],
            **{name: gain / (sum(gains.values()) or 1.0) for name, gain in gains.items()},
        }


_KL = {"kl": ("KL, nats a token", ".3f"), "style_share": ("style", ".0%")}
_AUC = {
    "group_auc": ("AUC within groups", ".3f"),
    "group_auc_low": ("low", ".3f"),
    "group_auc_high": ("high", ".3f"),
}
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "": {
        "kind": ("kind", ""),
        "exemplars": ("exemplars a pool", "d"),
        "rollouts": ("rollouts", "d"),
        **_KL,
        "substance_kl": ("substance, nats", ".3f"),
        **_AUC,
        "digit_auc": ("on digits", ".3f"),
        "projected_auc": ("projected", ".3f"),
        "gain_correct": ("gained: in correct exemplars", ".0%"),
        "gain_both": ("in both", ".0%"),
        "gain_failed": ("in failed", ".0%"),
        "gain_neither": ("in neither", ".0%"),
    },
    "_classes": {
        "name": ("token", ""),
        "tokens": ("tokens", "d"),
        **_KL,
        **_AUC,
    },
}
COLUMNS["_places"] = {**COLUMNS["_classes"], "name": ("place in the rollout", "")}


def main(out: Path, name: str, config: RunConfig, fewest: int, most_groups: int | None) -> None:
    """Measure the groups of round 1, and write the tables."""
    run = Run(config)
    problems = {p.problem_id: p for p in run.problems("train")}
    planners = {choose: context_planner(Run(_choosing(config, choose))) for choose in ("hash", "nearest")}
    experiment = Experiment(config, fewest)
    measured = 0
    for problem_id, group in read_groups(run, 1).items():
        if measured == most_groups:
            break
        with torch.inference_mode():
            measured += experiment.measure(problems[problem_id], group, planners)
        print(f"{measured} groups", end="\r", flush=True)
    if not measured:
        sys.exit(f"no rollout of round 1 has {fewest} others of each outcome: sample more, or lower --fewest")
    for table, rows in experiment.tables():
        write_results(out, f"exemplars_{name}{table}", rows, COLUMNS[table])


def _choosing(config: RunConfig, choose: str) -> RunConfig:
    """The configuration with pools of up to 16 rollouts, chosen in this way, and no solution among them."""
    pools = [{"name": pool, "max_exemplars": 16, "choose": choose} for pool in ("correct", "incorrect")]
    settings = config.model_dump(mode="json")
    settings["teacher"] |= {"pools": pools, "reference_exemplar": False, "empty_pool": "skip", "unanimous": "skip"}
    settings["steer"] |= {"recipe": "none"}
    settings["train"] |= {"rollouts": "all"}
    return RunConfig.model_validate(settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--fewest", type=int, default=1)
    parser.add_argument("--groups", type=int)
    given = parser.parse_intermixed_args()
    if given.fewest < 1:
        parser.error("--fewest must be at least 1: a direction needs an exemplar in each pool")
    file = Path("deployments/runs") / f"{given.config}.toml"
    main(given.out, given.name, load_config(file, given.overrides), given.fewest, given.groups)
