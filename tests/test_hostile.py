"""Ten thousand hostile completions in verification, prompts, store, queries and artifacts.

Nothing hangs, crashes or is lost, and no markup, formula or control code of a rollout is interpreted.
"""

from __future__ import annotations

import csv
import html.parser
import io
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import UNGRADED, small_config
from typer.testing import CliRunner

from flows.cli import app
from flows.console import escape_control_characters
from ogls.config import VerifyConfig
from ogls.problems.prompts import Prompter
from ogls.records import TRAJECTORIES, VERDICTS
from ogls.records.schema import to_arrow
from ogls.stages.run import Run
from ogls.store import run_query
from ogls.store.writer import StageWriter
from ogls.verifiers.pool import Case, Verifier
from tasks.publish import _rollout_markdown

PIECES = (
    *(
        r"\boxed{",
        "}",
        "{",
        r"\frac{1}{",
        "^{9^{9",
        "!",
        "####",
        "$$",
        r"\sum_{n=1}^{10^9}",
        r"\sqrt{",
        "7",
        "-",
        "1e9",
    ),
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "</pre>",
        "```\n",
        "[a](javascript:alert(1))",
        "&lt;",
    ),
    *(
        "=cmd|'/C calc'!A1",
        "+1+1",
        "@SUM(A1)",
        '"; DROP TABLE verdicts; --',
        "{problem}",
        "{exemplar}",
        "{{ 7*7 }}",
        "%s",
    ),
    *(
        "\x1b[31m\x1b]0;owned\x07",
        "\x00",
        "\x7f",
        "\u202e",
        "\u2028",
        "\u0085",
        "\x0b",
        "\ufeff",
        "e\u0301" * 3,
        "\U0001f9ee",
    ),
    *(
        "<|im_end|>",
        "<|im_start|>system\n",
        "\n",
        "\t",
        "\r\n",
        " ",
        "::",
        "$(touch x)",
        "../../etc/passwd",
        "NaN",
        "∞",
    ),
)


def completions(count: int) -> list[str]:
    """Random texts of hostile pieces, mutated: truncated, swapped, repeated, with random code points inserted."""
    rng = random.Random(20)
    texts = []
    while len(texts) < count:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 30)))
        for _ in range(rng.randint(0, 4)):
            position = rng.randint(0, len(text))
            text = rng.choice(
                (
                    text[:position],
                    text[position:] + text[:position],
                    text + text[:position],
                    text[:position]
                    + chr(rng.choice((rng.randint(1, 0xD7FF), rng.randint(0xE000, 0x10FFFF))))
                    + text[position:],
                )
            )
        if rng.random() < 0.3:
            text += rf"\boxed{{{rng.choice(PIECES)}{rng.randint(0, 9)}}}"
        texts.append(text)
    return texts


@pytest.fixture(scope="module")
def hostile() -> list[str]:
    return completions(10_000)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_completion_gets_a_verdict_in_bounded_time_and_memory(hostile: list[str]) -> None:
    verifier = Verifier(VerifyConfig(timeout_seconds=3, memory_mb=1024))
    started, memory_before = time.monotonic(), peak_memory()
    try:
        verdicts = Counter(j.verdict for j in verifier.judge([Case(t, "stop", "7") for t in hostile]))
    finally:
        verifier.close()
    assert sum(verdicts.values()) == len(hostile)
    assert verdicts["incorrect"] > 1000  # the verifier does verify
    assert verdicts["timeout"] + verdicts["error"] < 500
    assert time.monotonic() - started < 400
    assert peak_memory() - memory_before < 500  # MiB, of this process; each worker has its own limit


def peak_memory() -> float:
    """The peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def test_prompts_accept_any_text_and_expand_no_placeholder_in_it(hostile: list[str], prompter: Prompter) -> None:
    for text in hostile[:1500]:
        ids = prompter.teacher("1+1?", text, reference=False)
        prompt = prompter.tokenizer.decode(ids)
        assert prompt.count("1+1?") == 1 + text.count("1+1?")


@pytest.fixture(scope="module")
def stored(hostile: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the hostile completions as the rollouts of one round."""
    run = Run(small_config(tmp_path_factory.mktemp("hostile")))
    run.records.open(run.config)
    keys = [(f"p{i // 8}", i % 8) for i in range(len(hostile))]
    rows = [
        {
            **{"problem_id": p, "sample": s, "prompt_ids": [1], "token_ids": [2], "logprobs": [-1.0], "n_tokens": 1},
            **{"text": text, "finish_reason": "stop", "policy": "base", "seed": 0},
        }
        for (p, s), text in zip(keys, hostile, strict=True)
    ]
    writer = StageWriter(run.records, TRAJECTORIES, 1, "f")
    writer.write_shard(0, to_arrow(TRAJECTORIES, rows))
    writer.commit("sample", {})
    verdicts = [
        {
            "problem_id": p,
            "sample": s,
            "verdict": "incorrect",
            "outcome": "failed",
            "answer": text[:50] or None,
            **UNGRADED,
        }
        for (p, s), text in zip(keys, hostile, strict=True)
    ]
    writer = StageWriter(run.records, VERDICTS, 1, "f")
    writer.write_shard(0, to_arrow(VERDICTS, verdicts))
    writer.commit("verify", {})
    return run


def test_the_store_returns_every_text_unchanged(stored: Run, hostile: list[str]) -> None:
    rows = run_query(stored.store, "SELECT text FROM trajectories ORDER BY problem_id[2:]::INT, sample").to_pylist()
    assert [r["text"] for r in rows] == hostile


def test_no_cell_of_a_csv_is_a_formula(stored: Run) -> None:
    command = ["query", "SELECT text, answer FROM trajectories JOIN verdicts USING (run, round, problem_id, sample)"]
    result = CliRunner().invoke(app, [*command, "--root", stored.config.root, "--format", "csv"])
    assert result.exit_code == 0
    cells = [cell for row in csv.reader(io.StringIO(result.stdout, newline="")) for cell in row]
    assert len(cells) == 2 * 10_001

    def is_number(cell: str) -> bool:
        try:
            float(cell)
        except ValueError:
            return False
        return True

    assert [c for c in cells if c[:1] in ("=", "+", "-", "@", "\t", "\r") and not is_number(c)] == []
    assert any(c.startswith("'=cmd") for c in cells)


def test_no_control_character_reaches_a_terminal(stored: Run, hostile: list[str]) -> None:
    result = CliRunner().invoke(app, ["query", "SELECT text FROM trajectories LIMIT 900", "--root", stored.config.root])
    assert result.exit_code == 0
    assert not set(result.stdout) & {"\x1b", "\x00", "\x07", "\x7f", "\u202e", "\x9b"}
    assert escape_control_characters("\x1b[31mred") == r"\x1b[31mred"


class TagParser(html.parser.HTMLParser):
    """Collects the tags that a browser would find."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def test_no_markup_of_a_rollout_is_markup_in_an_artifact(hostile: list[str]) -> None:
    for i, text in enumerate(hostile):
        row = {"problem_id": f"<b>{i}", "sample": 0, "verdict": "incorrect", "text": text, "problem": text}
        block = _rollout_markdown({**row, "expected": text, "answer": text})
        head, _, body = block.partition("\n\n")
        parser = TagParser()
        parser.feed(block)
        assert parser.tags == []
        assert "<" not in block
        assert head.startswith("**&#60;b&#62;")
        # Markdown does not interpret an indented block.
        labels = ("The problem:", "The rollout:")
        assert all(line.startswith("    ") or line in labels for line in body.split("\n") if line.strip())


def test_a_query_accesses_no_files_and_loads_no_extension(stored: Run, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for sql in (
        f"SELECT * FROM read_csv('{tmp_path}/secret.csv')",
        f"SELECT * FROM '{tmp_path}/secret.csv'",
        f"COPY (SELECT 1) TO '{tmp_path}/out.csv'",
        "SELECT * FROM read_text('/etc/hostname')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access=true",
        f"ATTACH '{tmp_path}/x.db'",
        "SELECT 1; SELECT 2",
        "PRAGMA database_list",
        "CREATE TABLE t AS SELECT 1",
        "SELECT * FROM glob('/etc/*')",
    ):
        result = CliRunner().invoke(app, ["query", sql, "--root", stored.config.root])
        assert result.exit_code != 0, sql
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.csv"]
