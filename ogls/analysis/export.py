"""Exporting rollouts as a dataset for other trainers: a Hugging Face dataset folder or JSON Lines.

Kinds: `rollouts` (one row per rollout, with its problem and verdict), `messages` (each rollout as a conversation, with
its verdict, reward, group and the log-probs of its tokens), `inspect` (logs that Inspect's viewer opens, see
`inspect_log`), `sft` (conversations that end in a correct rollout) and `preference` (a correct and a failed rollout of
the same group, as chosen and rejected). Conversations use the student prompt of the run, in OpenAI's form: a list of
`role` and `content`. TRL's trainers read `messages`, `prompt`, `chosen` and `rejected`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from ogls.analysis.inspect_log import write_inspect_logs
from ogls.config import PromptsConfig
from ogls.errors import DataError
from ogls.problems.prompts import escape_control_tokens, fill_template
from ogls.store import Store, run_query
from ogls.store.atomic import atomic_write

Kind = Literal["rollouts", "messages", "inspect", "sft", "preference"]
_Prompts = tuple[PromptsConfig, list[str]]  # the templates of a run, and the control tokens of its tokenizer


KINDS: tuple[Kind, ...] = get_args(Kind)


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_KEY = [("run", pa.string()), ("round", pa.int32()), ("problem_id", pa.string())]
_SCHEMAS = {
    "messages": pa.schema(
        [
            *(("messages", _MESSAGES), *_KEY, ("sample", pa.int32()), ("group", pa.string()), ("verdict", pa.string())),
            *(("outcome", pa.string()), ("reward", pa.float64()), ("answer", pa.string()), ("expected", pa.string())),
            *(("finish_reason", pa.string()), ("policy", pa.string())),
            *(("token_ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float32()))),
        ]
    ),
    "sft": pa.schema([("messages", _MESSAGES), *_KEY, ("sample", pa.int32())]),
    "preference": pa.schema(
        [
            *(("prompt", _MESSAGES), ("chosen", _MESSAGES), ("rejected", _MESSAGES), *_KEY),
            *(("chosen_sample", pa.int32()), ("rejected_sample", pa.int32())),
        ]
    ),
}


_ROLLOUTS = """
SELECT run, round, problem_id, sample, problem, solution, problems.answer AS expected, text, verdict, outcome,
       verdicts.answer AS answer, n_tokens, finish_reason, policy{more}
FROM trajectories JOIN verdicts USING (run, round, problem_id, sample)
JOIN (SELECT * EXCLUDE (round) FROM problems WHERE split = 'train') AS problems USING (run, problem_id)
"""


def select_rows(store: Store, kind: Kind, where: str = "true", run: str | None = None, pairs: int = 1) -> pa.Table:
    """Return the rows of a dataset from the rollouts that satisfy the SQL condition `where`, sorted by key.

    `where` may use any column of the kind `rollouts`. A group gives at most `pairs` preference pairs, in the order of
    its samples, and no rollout is in two pairs. The kind `inspect` has the columns of `rollouts` and `messages`. Raises
    DataError if no row is selected.
    """
    selected = _ROLLOUTS.format(more=", token_ids, logprobs" if kind == "messages" else "")
    sql = f"SELECT * FROM ({selected}) WHERE ({where}\n) ORDER BY run, round, problem_id, sample"
    table = run_query(store, sql, run)
    if kind != "rollouts":
        prompts = {name: _prompts(store, name) for name in table["run"].unique().to_pylist()}
        build = _BUILDERS[kind]
        rows = list(build(table.to_pylist(), prompts, pairs))
        table = pa.Table.from_pylist(rows, schema=_SCHEMAS.get(kind))
    if not len(table):
        missing = {"sft": "correct rollout", "preference": "group with both outcomes"}.get(kind, "rollout")
        raise DataError(f"no rows: the rollouts that satisfy {where} contain no {missing}; see `ogls runs`")
    return table


def write_dataset(table: pa.Table, out: Path, kind: Kind, origin: str) -> None:
    """Write rows to a `.jsonl` file, or to a new folder that `datasets.load_dataset` opens, with a card.

    The kind `inspect` is written by `write_logs`. The write is atomic; the card contains `origin`. Raises UserError if
    `out` exists or cannot be written.
    """
    with atomic_write(out) as target:
        if out.suffix == ".jsonl":
            with open(target, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
        else:
            (target / "data").mkdir(parents=True)
            pq.write_table(table, target / "data" / "train-00000-of-00001.parquet", compression="zstd")
            (target / "README.md").write_text(_card(table, kind, origin), encoding="utf-8")


def write_logs(store: Store, table: pa.Table, out: Path) -> int:
    """Write rows of the kind `inspect` as logs (`write_inspect_logs`). Returns the number of logs."""
    facts = {}
    for run in table["run"].unique().to_pylist():
        info = store.run(run).read_info() or {}
        config = info["config"]
        facts[run] = {
            "created": info["created"],
            "version": info["version"],
            "model": config["model"]["path"],
            "source": config["problems"]["source"],
            **{name: config["rollout"][name] for name in ("samples", "temperature", "max_tokens")},
        }
    return write_inspect_logs(table.to_pylist(), facts, out)


def _prompts(store: Store, run: str) -> _Prompts:
    info, manifest = store.run(run).read_info() or {}, store.run(run).manifest("problems", 0)
    control_tokens = manifest.metrics.get("control_tokens", []) if manifest else []
    return PromptsConfig.model_validate(info["config"]["prompts"]), control_tokens


def _prompt_messages(row: dict[str, Any], prompts: dict[str, _Prompts]) -> list[dict[str, str]]:
    """The messages of the student's prompt, with control tokens in the problem escaped as for sampling."""
    config, control_tokens = prompts[row["run"]]
    system = [{"role": "system", "content": config.system}] if config.system else []
    problem = escape_control_tokens(row["problem"], control_tokens)
    return [*system, {"role": "user", "content": fill_template(config.student, problem=problem)}]


def _assistant_message(row: dict[str, Any]) -> dict[str, str]:
    return {"role": "assistant", "content": row["text"]}


def _with_messages(rows: Iterable[dict[str, Any]], prompts: dict[str, _Prompts], _: int) -> Iterator[dict[str, Any]]:
    """Each rollout with its conversation, its reward (1 correct, 0 failed, null undecided) and its group."""
    for row in rows:
        yield {
            **row,
            "messages": [*_prompt_messages(row, prompts), _assistant_message(row)],
            "reward": {"correct": 1.0, "failed": 0.0}.get(row["outcome"]),
            "group": f"{row['run']}/r{row['round']:03d}/{row['problem_id']}",
        }


def _conversations(rows: Iterable[dict[str, Any]], prompts: dict[str, _Prompts], _: int) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["outcome"] == "correct":
            key = {n: row[n] for n in ("run", "round", "problem_id", "sample")}
            yield {"messages": [*_prompt_messages(row, prompts), _assistant_message(row)], **key}


def _preferences(rows: Iterable[dict[str, Any]], prompts: dict[str, _Prompts], pairs: int) -> Iterator[dict[str, Any]]:
    for (run, round_, problem_id), members in groupby(rows, key=lambda r: (r["run"], r["round"], r["problem_id"])):
        group = list(members)
        correct = [r for r in group if r["outcome"] == "correct"]
        failed = [r for r in group if r["outcome"] == "failed"]
        for chosen, rejected in list(zip(correct, failed, strict=False))[:pairs]:
            yield {
                "prompt": _prompt_messages(chosen, prompts),
                "chosen": [_assistant_message(chosen)],
                "rejected": [_assistant_message(rejected)],
                "run": run,
                "round": round_,
                "problem_id": problem_id,
                "chosen_sample": chosen["sample"],
                "rejected_sample": rejected["sample"],
            }


_BUILDERS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "messages": _with_messages,
    "inspect": _with_messages,
    "sft": _conversations,
    "preference": _preferences,
}


def _card(table: pa.Table, kind: Kind, origin: str) -> str:
    columns = "\n".join(f"- `{f.name}`: {f.type}" for f in table.schema)
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- ogls-sd
- {kind}
---

# {kind} rows from OGLS-SD rollouts

{len(table)} rows. {origin}

{columns}
"""
