"""Rollouts exported as datasets: their rows, loading in `datasets`, bad conditions, and atomic writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import small_config
from typer.testing import CliRunner

from flows.cli import app
from ogls.analysis.export import _prompt_messages, _prompts, select_rows, write_dataset
from ogls.errors import DataError, UserError
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.store import Store


@pytest.fixture(scope="module")
def store(finished: Run) -> Store:
    return finished.store


def test_sft_rows_are_correct_rollouts_under_their_own_prompt(store: Store, finished: Run) -> None:
    rows = select_rows(store, "sft", "round = 2").to_pylist()
    verdicts = finished.records.read("verdicts", 2).to_pylist()
    correct = {(v["problem_id"], v["sample"]) for v in verdicts if v["outcome"] == "correct"}
    assert {(r["problem_id"], r["sample"]) for r in rows} == correct
    texts = {p.problem_id: p.problem for p in finished.problems("train")}
    completions = {
        (t["problem_id"], t["sample"]): t["text"] for t in finished.records.read("trajectories", 2).to_pylist()
    }
    for row in rows:
        prompt, answer = row["messages"]
        assert prompt == {"role": "user", "content": texts[row["problem_id"]]}
        assert answer == {"role": "assistant", "content": completions[row["problem_id"], row["sample"]]}


@pytest.mark.parametrize("pairs", [1, 9])
def test_preference_pairs_are_of_one_group(store: Store, finished: Run, pairs: int) -> None:
    rows = select_rows(store, "preference", pairs=pairs).to_pylist()
    outcomes = {
        (r, v["problem_id"], v["sample"]): v["outcome"]
        for r in (1, 2)
        for v in finished.records.read("verdicts", r).to_pylist()
    }
    groups: dict[tuple[int, str], list[str]] = {}
    for (round_, problem_id, _), outcome in outcomes.items():
        groups.setdefault((round_, problem_id), []).append(outcome)
    assert len(rows) == sum(min(g.count("correct"), g.count("failed"), pairs) for g in groups.values())
    for row in rows:
        assert outcomes[row["round"], row["problem_id"], row["chosen_sample"]] == "correct"
        assert outcomes[row["round"], row["problem_id"], row["rejected_sample"]] == "failed"
        assert row["chosen"] != row["rejected"]


def test_a_dataset_folder_loads_in_datasets(store: Store, tmp_path: Path) -> None:
    from datasets import load_dataset

    table = select_rows(store, "preference")
    write_dataset(table, tmp_path / "pairs", "preference", "From a test.")
    loaded = load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == table.to_pylist()
    assert "From a test." in (tmp_path / "pairs" / "README.md").read_text()


def test_the_dataset_command(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "some" / "sft.jsonl"
    command = ["dataset", str(out), "--kind", "sft", "--where", "n_tokens < 40", "--root", store.root]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == select_rows(store, "sft", "n_tokens < 40").to_pylist()
    assert f"{len(rows)} rows" in result.output
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, UserError)
    assert "already exists" in str(again.exception)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("round = 99", "no rows"),
        ("nonsense = 1", "nonsense"),
        ("true); DROP VIEW verdicts; --", "failed"),
        ("text IN (SELECT content FROM read_text('/etc/hostname'))", "failed"),
    ],
)
def test_a_bad_condition_raises(store: Store, where: str, message: str) -> None:
    with pytest.raises((DataError, UserError), match=message):
        select_rows(store, "sft", where)


def test_a_failed_write_leaves_no_files(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", raise_disk_full)
    with pytest.raises(UserError, match="No space left"):
        write_dataset(select_rows(store, "rollouts"), tmp_path / "out", "rollouts", "")
    assert list(tmp_path.iterdir()) == []


def test_control_tokens_in_a_problem_are_escaped_as_in_the_prompt(tmp_path: Path) -> None:
    row = json.loads(Path("data/tiny/train.jsonl").read_text().splitlines()[0])
    rows = [row | {"id": str(i), "problem": f"<|im_end|> {i}: {row['problem']}"} for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = Run(small_config(tmp_path, f"problems.source={tmp_path}/p.jsonl", "rollout.samples=2"))
    run.open()
    for stage, round_ in (("prepare", 0), ("sample", 1)):
        STAGES[stage](run, round_)
    manifest = run.records.manifest("problems", 0)
    assert manifest
    assert "<|im_end|>" in manifest.metrics["control_tokens"]
    prompts = {run.config.name: _prompts(run.store, run.config.name)}
    (user,) = _prompt_messages({"run": run.config.name, "problem": rows[0]["problem"]}, prompts)
    assert user["content"].startswith("< |im_end|> 0")
    tokenizer = run.load_policy().tokenizer
    sampled = {r["problem_id"]: r["prompt_ids"] for r in run.records.read("trajectories", 1).to_pylist()}
    for problem_id, ids in sampled.items():
        (user,) = _prompt_messages({"run": run.config.name, "problem": rows[int(problem_id)]["problem"]}, prompts)
        assert run.prompter(tokenizer)._ids(user["content"]) == ids
