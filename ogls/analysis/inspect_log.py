"""Rollouts as logs of Inspect (inspect.aisi.org.uk), which `inspect view` opens: one log per run and round.

A rollout is a sample of the log: its problem is the id, its number in the group is the epoch. The format is the JSON of
Inspect's EvalLog, version 2; it is written without Inspect, and tests/test_readers.py reads it with Inspect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from ogls.config.fingerprint import fingerprint
from ogls.errors import DataError
from ogls.store.atomic import atomic_write

_VALUES = {"correct": "C", "failed": "I"}  # of Inspect's scores; N: no answer could be judged
_STOP_REASONS = {"stop": "stop", "length": "max_tokens"}
_NO_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}


def write_inspect_logs(rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]], out: Path) -> int:
    """Write rollouts, sorted by run and round, to a new folder of logs, or to one `.json` file for a single round.

    Each row has the columns of the kind `rollouts` and `messages` (the prompt and the completion). `facts` has by run
    its `created` time, `model`, `source` of the problems, `samples` (group size), `temperature`, `max_tokens` and
    `version`. Atomic. Returns the number of logs. Raises DataError if one file would need several logs.
    """
    logs = {
        (run, round_): _log(run, round_, list(members), facts[run])
        for (run, round_), members in groupby(rows, key=lambda r: (r["run"], r["round"]))
    }
    if out.suffix == ".json" and len(logs) > 1:
        raise DataError(f"{out}: a log holds one round, and {len(logs)} were selected; add --where, or name a folder")
    with atomic_write(out) as target:
        if out.suffix == ".json":
            (log,) = logs.values()
            target.write_text(json.dumps(log, ensure_ascii=False), encoding="utf-8")
        else:
            target.mkdir(parents=True)
            for (run, round_), log in logs.items():
                # Inspect lists files by this pattern: time, task, id.
                time = log["eval"]["created"].partition(".")[0].replace(":", "-")
                name = f"{time}+00-00_{run.replace('_', '-')}-r{round_:03d}_{log['eval']['task_id']}.json"
                (target / name).write_text(json.dumps(log, ensure_ascii=False), encoding="utf-8")
    return len(logs)


def _log(run: str, round_: int, rows: list[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """One round of a run as an EvalLog."""
    created, model = str(facts["created"]), str(facts["model"])
    ids = list(dict.fromkeys(row["problem_id"] for row in rows))
    judged = [row for row in rows if row["outcome"] in _VALUES]
    correct = sum(row["outcome"] == "correct" for row in judged)
    accuracy = correct / len(judged) if judged else 0.0
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "created": created,
            "task": f"{run}-r{round_:03d}",
            "task_id": fingerprint(run, round_, created)[:22],
            "run_id": run,
            "dataset": {"name": facts["source"], "samples": len(ids), "sample_ids": ids, "shuffled": False},
            "model": model,
            "model_generate_config": {"temperature": facts["temperature"], "max_tokens": facts["max_tokens"]},
            "config": {"epochs": facts["samples"]},
            "packages": {"ogls-sd": facts["version"]},
            "metadata": {"run": run, "round": round_, "policy": rows[0]["policy"]},
        },
        "plan": {"name": "plan", "steps": [{"solver": "generate", "params": {}}], "config": {}},
        "results": {
            "total_samples": len(rows),
            "completed_samples": len(rows),
            "scores": [
                {
                    "name": "verdict",
                    "scorer": "verdict",
                    "params": {},
                    "scored_samples": len(judged),
                    "unscored_samples": len(rows) - len(judged),
                    "metrics": {"accuracy": {"name": "accuracy", "value": accuracy, "params": {}}},
                }
            ],
        },
        "stats": {"started_at": created, "completed_at": created, "model_usage": {}},
        "samples": [_sample(row, model) for row in rows],
    }


def _sample(row: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A rollout as an EvalSample."""
    *prompt, said = row["messages"]
    completion = {**said, "source": "generate", "model": model}
    usage = {**_NO_TOKENS, "output_tokens": row["n_tokens"], "total_tokens": row["n_tokens"]}
    stop = _STOP_REASONS.get(row["finish_reason"], "unknown")
    return {
        "id": row["problem_id"],
        "epoch": row["sample"] + 1,
        "input": prompt,
        "target": row["expected"] or "",
        "messages": [*prompt, completion],
        "output": {"model": model, "choices": [{"message": completion, "stop_reason": stop}], "usage": usage},
        "scores": {
            "verdict": {
                "value": _VALUES.get(row["outcome"], "N"),
                "answer": row["answer"],
                "explanation": row["verdict"],
            }
        },
        "metadata": {key: row[key] for key in ("run", "round", "problem_id", "sample", "verdict", "policy")},
    }
