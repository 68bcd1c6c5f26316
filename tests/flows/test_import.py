"""`ogls import`: exported rollouts, imported as a new run, give the bits of the run that they come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, SMALL, TINY, again, carry_out, content, small_config
from randommodel import random_model

from flows import cli
from ogls.analysis.export import select_rows
from ogls.config import RunConfig
from ogls.errors import StoreError
from ogls.stages.check import find_damage, repair
from ogls.stages.registry import STAGES
from ogls.stages.run import Run, open_run

GSM8K = REPO.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"
CHAT = ["--messages", "messages", "--answer", "expected", "--id", "problem_id"]
TOKENS = ["--token-ids", "token_ids", "--logprobs", "logprobs", "--finish-reason", "finish_reason"]


def exported(finished: Run, path: Path) -> list[dict[str, Any]]:
    """Round 1 of a run as rows of `ogls dataset --kind messages`, in the order of sampling, also in a file.

    They have the reference solutions as another column.
    """
    rows = select_rows(finished.store, "messages", "round = 1", finished.config.name).to_pylist()
    keys = finished.records.read("trajectories", 1, ["problem_id", "sample"]).to_pylist()
    order = {(k["problem_id"], k["sample"]): i for i, k in enumerate(keys)}
    rows.sort(key=lambda r: order[r["problem_id"], r["sample"]])
    solutions = {p.problem_id: p.solution for p in finished.problems("train")}
    rows = [row | {"solution": solutions[row["problem_id"]]} for row in rows]
    write(path, rows)
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_import(file: Path, root: Path, patch: pytest.MonkeyPatch, *options: str, name: str = "copy") -> int:
    """Run `ogls import` in this process with the small configuration; returns its exit code."""
    overrides = [o for o in SMALL if not o.startswith("name=")] + [f"root={root}", "evaluate.benchmarks.0.limit=8"]
    settings = [part for override in overrides for part in ("--set", override)]
    patch.setattr(sys, "argv", ["ogls", "import", str(file), "--config", str(TINY), "--run", name, *settings, *options])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def imported_config(root: Path, *overrides: str) -> RunConfig:
    """The configuration of the imported run, which does not name the rollouts."""
    return small_config(root, "name=copy", *overrides)


def test_an_imported_round_gives_the_bits_of_the_run_that_it_comes_from(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(finished, tmp_path / "c.jsonl")
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT, *TOKENS, "--correct", "reward") == 0
    printed = capsys.readouterr()
    assert "sample r001: 32 rows, done" in printed.out
    assert "the training problems are those of the imported rollouts" in printed.err
    run = carry_out(imported_config(tmp_path), 1)
    copied, original = content(run), content(finished)
    same = [f"{table} 1" for table in ("verdicts", "teacher_states", "targets", "style", "updates", "scores")]
    assert {name: copied[name] for name in same} == {name: original[name] for name in same}
    assert copied["scores 0"] == original["scores 0"]
    assert run.policy_hash(1) == finished.policy_hash(1)
    trajectories = run.records.read("trajectories", 1)
    assert set(trajectories["policy"].to_pylist()) == {"imported"}
    kept = ["problem_id", "sample", "prompt_ids", "token_ids", "logprobs", "n_tokens", "text", "finish_reason"]
    assert trajectories.select(kept).equals(finished.records.read("trajectories", 1, kept))
    manifest = run.records.manifest("updates", 1)
    assert manifest
    assert manifest.metrics["notice"] == "round 1 is off-policy: its rollouts were imported"


def test_later_rounds_are_sampled_and_nothing_is_redone(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(finished, tmp_path / "c.jsonl")
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT) == 0
    run = carry_out(imported_config(tmp_path))
    second = run.records.read("trajectories", 2)
    assert set(second["policy"].to_pylist()) == {run.policy_hash(1)}
    assert set(second["problem_id"].to_pylist()) == set(run.records.read("trajectories", 1)["problem_id"].to_pylist())
    assert set(again(Run(imported_config(tmp_path))).values()) == {(True, "")}
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT) == 0  # finds itself done
    assert find_damage(run) == []


def test_completions_without_tokens_are_tokenized_and_judged(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(finished, tmp_path / "c.jsonl")
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT, "--finish-reason", "finish_reason") == 0
    run = open_run(str(tmp_path), "copy")
    assert content(run)["verdicts 1"] == content(finished)["verdicts 1"]
    own = run.records.read("trajectories", 1).to_pylist()
    sampled = finished.records.read("trajectories", 1).to_pylist()
    assert all(not r["logprobs"] for r in own)
    equal = [r["token_ids"] == s["token_ids"] for r, s in zip(own, sampled, strict=True)]
    assert sum(equal) > len(equal) / 2  # the model may spell a text with other tokens than the tokenizer
    assert [r["n_tokens"] for r in own] == [len(r["token_ids"]) for r in own]


def test_labels_decide_and_differences_to_the_verifier_are_reported(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = exported(finished, tmp_path / "c.jsonl")
    first = rows[0]
    first["reward"] = 1.0 - first["reward"]
    rows[1]["reward"] = None
    write(tmp_path / "c.jsonl", rows)
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT, "--correct", "reward") == 0
    assert "the verifier does not agree with 1 of 31 labels, which are kept" in capsys.readouterr().err
    run = open_run(str(tmp_path), "copy")
    outcomes = run.records.read("verdicts", 1)["outcome"].to_pylist()
    assert outcomes[0] == ("correct" if first["reward"] else "failed")
    assert outcomes[1:] == [r["outcome"] for r in rows[1:]]


def test_damaged_files_of_an_imported_round_are_restored(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(finished, tmp_path / "c.jsonl")
    run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT)
    for table in ("problems/round=000", "trajectories/round=001", "verdicts/round=001"):
        (file,) = (tmp_path / "copy" / table).glob("part-0000.parquet")
        file.write_bytes(file.read_bytes()[:-1])
    run = open_run(str(tmp_path), "copy")
    damaged = find_damage(run)
    assert [d.stage for d in damaged] == ["prepare", "sample", "verify"]
    assert [reason for _, reason in repair(run, damaged)] == ["", "", ""]
    assert find_damage(run) == []
    (tmp_path / "copy" / "imported" / "round=001" / "part-0000.parquet").unlink()
    (damage,) = find_damage(run)
    assert damage.consequence == "`ogls import` computes it again"
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT) == 0
    assert find_damage(run) == []


def test_a_run_keeps_its_rollouts(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = exported(finished, tmp_path / "c.jsonl")
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT) == 0
    before = content(open_run(str(tmp_path), "copy"))
    write(tmp_path / "other.jsonl", rows[:-1])
    assert run_import(tmp_path / "other.jsonl", tmp_path, monkeypatch, *CHAT) == 2
    assert "run copy has other imported rollouts; import into a new run" in " ".join(capsys.readouterr().err.split())
    assert content(open_run(str(tmp_path), "copy")) == before
    STAGES["prepare"](carry_out(small_config(tmp_path, "name=sampled", "rounds=0")), 0)
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT, name="sampled") == 2
    assert "run sampled has rounds that it samples" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(StoreError, match=r"exists with another configuration.*\n.*rollout\.imported"):
        Run(imported_config(tmp_path, "rollout.imported=another")).open()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "ogls-sd needs a problem with at least one correct and one failed completion"),
        (["train.objective=grpo"], "grpo needs a problem with at least one correct and one failed completion"),
        (["train.objective=rft"], "rft needs a correct completion"),
        (["train.objective=sft"], "sft needs a problem with a solution"),
    ],
)
def test_without_a_usable_group_no_run_is_left(
    settings: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"problem": f"Modulo 10, left to right: $1+{n}$", "answer": "9", "completion": r"\boxed{0}"} for n in (1, 2)
    ]
    write(tmp_path / "c.jsonl", [*rows, {"problem": "no answer?", "completion": "1"}])
    options = [part for setting in settings for part in ("--set", setting)]
    assert run_import(tmp_path / "c.jsonl", tmp_path / "runs", monkeypatch, *options) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert "1 bad line left out: 1 no answer: line 3" in errors
    assert f"no usable group in {tmp_path / 'c.jsonl'}: {message}" in errors
    assert not list((tmp_path / "runs").glob("copy*"))


def test_what_does_not_fit_the_run_is_left_out_with_its_line(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = exported(finished, tmp_path / "c.jsonl")
    rows[0] |= {"token_ids": [5, 6], "logprobs": None}
    rows[1]["token_ids"] = [*rows[1]["token_ids"][:-1], 99_999]
    rows[2] |= {"token_ids": None, "logprobs": None, "messages": [*rows[2]["messages"][:-1], said("1+1=2\n" * 40)]}
    held_out = json.loads(Path("data/tiny/test.jsonl").read_text().splitlines()[0])
    rows.append(
        rows[3] | {"messages": [{"role": "user", "content": held_out["problem"]}, said("7")], "problem_id": "x"}
    )
    rows[-1] |= {"token_ids": None, "logprobs": None, "expected": held_out["answer"]}
    write(tmp_path / "c.jsonl", rows)
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT, *TOKENS) == 0
    errors = " ".join(capsys.readouterr().err.split())
    assert "2 with token ids of another tokenizer (line 1 (they do not spell the completion), line 2 (" in errors
    assert "1 longer than rollout.max_tokens (line 3 (" in errors
    assert "1 of problems that are not in the training split (line 33)" in errors
    assert "problems excluded: 1 in benchmark tiny (x)" in errors


def test_an_interrupted_import_continues(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(finished, tmp_path / "c.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("ogls.stages.verify.judge_rows", stop_machine)
        with pytest.raises(RuntimeError, match="the machine stops"):
            run_import(tmp_path / "c.jsonl", tmp_path, patch, *CHAT)
    capsys.readouterr()
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT) == 0
    printed = capsys.readouterr().out
    assert "sample r001: 32 rows, already done" in printed
    assert "verify r001: 32 rows, done" in printed


def stop_machine(*_: Any) -> None:
    raise RuntimeError("the machine stops")


def test_too_many_unusable_problems_are_refused_and_no_run_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"problem": f"{n}?", "answer": "1" if n else "}{", "completion": r"\boxed{1}"} for n in (0, 1, 2)]
    write(tmp_path / "c.jsonl", rows)
    assert run_import(tmp_path / "c.jsonl", tmp_path / "runs", monkeypatch) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert "the imported rollouts: 1 of 3 problems are unusable (1 unusable answer" in errors
    assert not list((tmp_path / "runs").glob("copy*"))


def test_a_configuration_that_names_rollouts_needs_them(tmp_path: Path) -> None:
    run = Run(imported_config(tmp_path, "rollout.imported=0123"))
    run.open()
    with pytest.raises(StoreError, match="the imported rollouts of run copy are missing; `ogls import` of the same"):
        STAGES["prepare"](run, 0)


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_pool_reads_a_column_of_the_imported_file(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = exported(finished, tmp_path / "c.jsonl")
    write(tmp_path / "c.jsonl", [row | {"hint": row["solution"]} for row in rows])
    pool = '{name="hinted", reads="hint", template="{problem}\\nSolution:\\n{exemplar}\\nNow you:"}'
    setting = f"teacher.pools=[{pool}]"
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT, "--set", setting) == 0
    run = open_run(str(tmp_path), "copy")
    assert {p.columns["hint"] for p in run.problems("train")} == {row["solution"] for row in rows}
    STAGES["teach"](run, 1)
    assert "hinted" in run.records.read("contexts", 1)["pool"].to_pylist()


@pytest.mark.parametrize("objective", ["grpo", "rft", "sft"])
def test_methods_without_a_teacher_train_on_an_imported_round(
    objective: str, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(finished, tmp_path / "c.jsonl")
    setting = f"train.objective={objective}"
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT, *TOKENS[:2], "--set", setting) == 0
    manifests = {}
    for name, round_ in (("sample", 1), ("verify", 1), ("train", 1)):
        manifests[name] = STAGES[name](Run(imported_config(tmp_path, setting)), round_)
    assert manifests["sample"].reused
    assert manifests["train"].metrics["steps"] > 0
    assert ("off-policy" in manifests["train"].notice) == (objective != "sft")


@pytest.mark.slow
def test_the_flow_trains_one_offline_round(
    finished: Run, prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flow_helpers import newest_flow_run, task_runs

    from flows.train import train_flow

    exported(finished, tmp_path / "c.jsonl")
    assert run_import(tmp_path / "c.jsonl", tmp_path, monkeypatch, *CHAT, *TOKENS) == 0
    train_flow(imported_config(tmp_path, "rounds=1"))
    states = {run.name: run.state_name for run in task_runs(newest_flow_run("train copy"))}
    assert {states[name] for name in ("prepare r000", "sample r001", "verify r001")} == {"Already done"}
    assert {states[name] for name in ("evaluate r000", "teach r001", "train r001", "health r001")} == {"Completed"}
    run = open_run(str(tmp_path), "copy")
    assert run.policy_hash(1) == finished.policy_hash(1)


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="the solutions of GSM8K are not here")
def test_real_solutions_of_other_models_make_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.path={random_model(tmp_path / 'model')}", "rollout.max_tokens=1200", "train.tokens=32"]
    settings += ["teacher.pools=[]", "teacher.exemplar_tokens=64", "verify.answer_pattern='^A: (.+)$'"]
    options = ["--problem", "question", "--solution", "ground_truth", "--limit", "12"]
    options += ["--completion", "*.solution", "--correct", "*.is_correct"]
    options += [part for setting in settings for part in ("--set", setting)]
    assert run_import(GSM8K, tmp_path, monkeypatch, *options) == 0
    printed = capsys.readouterr()
    assert "verify r001: 48 rows, done" in printed.out
    assert "does not agree" not in printed.err
    run = open_run(str(tmp_path), "copy")
    labels = [("failed", "correct")[bool(c)] for c in run.records.read("imported", 1)["correct"].to_pylist()]
    assert run.records.read("verdicts", 1)["outcome"].to_pylist() == labels
    for stage in ("teach", "steer", "style", "train"):
        result = STAGES[stage](run, 1)
        assert result.rows
