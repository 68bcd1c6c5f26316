"""The data dictionary `data/README.md`, generated from `ogls/records/` by `make docs`; a test compares them."""

from __future__ import annotations

import pyarrow as pa

from ogls.records import ALL_TABLES
from ogls.records.schema import SCHEMA_VERSION, Table
from ogls.store import named_queries
from ogls.store.query import STAGES_ABOUT, STAGES_COLUMNS

_HEAD = """# The data

Generated from `ogls/records/` by `make docs`: change it there, not here.

- `tiny/`: the embedded default, created by `ogls seed-model`: `model/` (the seed model, with its card),
  `train.jsonl` and `test.jsonl` (problems with reference solutions and answers).
- `runs/` (ignored by git): the store. `mlflow/` (ignored by git): MLflow's database and artifacts.

## The store

    runs/<run>/run.json                                  the resolved configuration of the run
    runs/<run>/<table>/round=003/part-0000.parquet       the rows, in shards
    runs/<run>/<table>/round=003/manifest.json           written last: the stage is complete if it exists
    runs/<run>/policy/round=003/adapter_model.safetensors and adapter_config.json: the adapter at the end of the round
    runs/<run>/policy/round=003/optimizer.safetensors    the optimizer's state; old ones are deleted
    runs/<run>/rounds/0000.json                          the numbers of fifty rounds, repeated from their manifests

Query it with `ogls query`, or read the Parquet files with any reader. Every table has `run` (the folder's name) and
`round` (from the path) in addition to the columns below. The key of a rollout is `(run, round, problem_id, sample)`.
Round 0 has the problems and the evaluation of the base model. Rollouts of round r are sampled from the policy at the
end of round r - 1; scores of round r are those of the policy at the end of round r. Log-probabilities are in nats.

"""


def data_dictionary() -> str:
    """Return the page as Markdown."""
    tables = "\n".join(_table(t) for t in ALL_TABLES)
    queries = "\n".join(
        f"- `{name}`: {sql.splitlines()[0].removeprefix('-- ')}" for name, sql in named_queries().items()
    )
    return (
        f"{_HEAD}Schema version {SCHEMA_VERSION}.\n\n{tables}\n### stages\n\n{STAGES_ABOUT} A view over the manifests, "
        f"with the columns {', '.join(STAGES_COLUMNS)}.\n\n## Named queries\n\n"
        f"`ogls query --name NAME`, in `ogls/store/sql/`.\n\n{queries}\n"
    )


def _table(table: Table) -> str:
    lines = [f"### {table.name}\n", f"{table.about} Written by `{table.stage}`.\n"]
    lines += ["| column | type | description |", "| --- | --- | --- |"]
    for column in table.schema:
        about = column.metadata[b"about"].decode() + (" May be null." if column.nullable else "")
        lines.append(f"| {column.name} | {_type(column.type)} | {about} |")
    return "\n".join([*lines, ""])


def _type(arrow: pa.DataType) -> str:
    if pa.types.is_map(arrow):
        return f"map of {arrow.key_type} to {arrow.item_type}"
    return f"list of {arrow.value_type}" if pa.types.is_list(arrow) else str(arrow)


if __name__ == "__main__":
    print(data_dictionary(), end="")
