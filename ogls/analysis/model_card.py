"""Exporting the policy of a round: merged weights, tokenizer, and a model card with its origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ogls.config import to_toml
from ogls.config.redact import redact_credentials
from ogls.models.load import load_causal, load_tokenizer
from ogls.models.merge import merge
from ogls.revision import code_version
from ogls.stages.run import Run
from ogls.stages.summaries import read_first_summary
from ogls.store.atomic import atomic_write


def export_model(run: Run, round_: int, out: Path) -> None:
    """Write the policy that a round ended with as a Hugging Face folder `out`, atomically.

    Raises UserError if `out` exists or cannot be written, StoreError if the round was not trained.
    """
    with atomic_write(out) as folder:
        run.policy_hash(round_)  # raises StoreError for a round that was not trained
        adapter = run.load_adapter(round_)
        causal = load_causal(run.config.model)
        if adapter:
            causal.load_state_dict(merge(causal.state_dict(), adapter, run.config.adapter))
        causal.save_pretrained(folder)
        load_tokenizer(run.config.model).save_pretrained(folder)
        (folder / "README.md").write_text(render_card(run, round_), encoding="utf-8")


def render_card(run: Run, round_: int) -> str:
    """Return the model card as Markdown: method, data, curve, settings, and the command to reproduce the model."""
    config, info = run.config, run.records.read_info() or {}
    rows = [(r, read_first_summary(run.records, r)) for r in run.records.rounds("scores") if r <= round_]
    problems = len(run.problems("train"))
    code = code_version()
    revision = f", revision {code['revision']}" if code["revision"] else ""
    return f"""---
base_model: {config.model.path}
library_name: transformers
pipeline_tag: text-generation
tags:
- ogls-sd
- {config.method}
---

# {config.name}, round {round_}

{config.model.path} after {round_} rounds of {_method(run)} (OGLS-SD, arXiv 2605.12400), merged. Policy
`{run.policy_hash(round_)}`; started {info.get("created", "")[:10]}, written by ogls-sd {code["version"]}{revision}.

## Data

{problems} training problems from `{redact_credentials(config.problems.source)}`, digest `{run.split_digest("train")}`;
{config.problems.per_round} problems per round, {config.rollout.samples} rollouts per problem.

## Curve

{_curve(rows)}

## Settings

Prompts were rendered with thinking {"on" if config.model.thinking else "off"} and this user message:

```
{config.prompts.student}
```

To reproduce it, run `ogls train` with this file:

```toml
{redact_credentials(to_toml(config))}```
"""


def _method(run: Run) -> str:
    config = run.config
    if not config.has_teacher:
        return config.method
    weights = ", ".join(f"{pool} {w:+g}" for pool, w in config.steer.to_recipe().weights().items())
    return f"{config.method} ({weights}; {config.train.loss or config.train.divergence})"


def _curve(rows: list[tuple[int, dict[str, Any]]]) -> str:
    if not rows:
        return "Not evaluated."
    lines = [
        "| round | benchmark | accuracy (avg@k) | 95% interval | greedy | length |",
        "| ---: | --- | --- | --- | --- | --- |",
    ]
    for round_, s in rows:
        interval = f"{s['accuracy_low']:.3f} to {s['accuracy_high']:.3f}"
        numbers = f"{s['accuracy']:.3f} | {interval} | {s['greedy_accuracy']:.3f} | {s['mean_length']:.1f}"
        lines.append(f"| {round_} | {s['benchmark']} | {numbers} |")
    return "\n".join(lines)
