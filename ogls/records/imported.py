"""The table of imported completions, from which `ogls import` makes round 1 of a run."""

from __future__ import annotations

import pyarrow as pa

from ogls.records.schema import Table, column, columns

IMPORTED = Table(
    "imported",
    "import",
    "One row per completion that `ogls import` read, in the order of the source; all are in round 1.",
    columns(
        column("line", pa.int32(), "Line or row of the source, from 1."),
        column("problem_id", pa.string(), "Id of the problem."),
        column("sample", pa.int32(), "Index of the completion in its group, from 0."),
        column("problem", pa.string(), "The question."),
        column("solution", pa.string(), "The reference solution.", nullable=True),
        column("expected", pa.string(), "The expected answer."),
        column("columns", pa.string(), "Further columns that pools read, as JSON.", nullable=True),
        column("text", pa.string(), "The completion."),
        column("finish_reason", pa.string(), "stop, or length if the source says that the completion was truncated."),
        column("correct", pa.bool_(), "The label of the source; without one, the verifier decides.", nullable=True),
        column("token_ids", pa.list_(pa.int32()), "Token ids of the source; empty: the text is tokenized."),
        column(
            "logprobs",
            pa.list_(pa.float32()),
            "Log-probability (nats) of each of token_ids, from the source; empty: not known.",
        ),
    ),
    float_lists=("token_ids", "logprobs"),
)
