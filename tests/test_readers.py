"""Exported rollouts are read by the tools that they are for: TRL, and Inspect (after `make inspect`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

from ogls.analysis.export import Kind, select_rows, write_dataset, write_logs
from ogls.errors import DataError, UserError
from ogls.stages.run import Run
from ogls.store import Store

INSPECT = Path(sys.prefix) / "inspect/bin/python"
READ_LOGS = """
import json, sys
from inspect_ai.log import list_eval_logs, read_eval_log
logs = [read_eval_log(info) for info in list_eval_logs(sys.argv[1])]
print(json.dumps([
    {
        "task": log.eval.task,
        "status": log.status,
        "model": log.eval.model,
        "epochs": log.eval.config.epochs,
        "accuracy": log.results.scores[0].metrics["accuracy"].value,
        "samples": [
            [s.id, s.epoch, s.input[-1].text, s.target, s.output.completion, s.output.stop_reason,
             s.scores["verdict"].value, s.scores["verdict"].answer, s.output.usage.output_tokens]
            for s in log.samples
        ],
    }
    for log in sorted(logs, key=lambda log: log.eval.task)
]))
"""


def select(run: Run, kind: Kind, **kwargs: Any) -> Any:
    return select_rows(Store(run.records.storage.path), kind, **kwargs)


def test_messages_have_the_verdict_the_group_and_the_log_probs(finished: Run) -> None:
    rows = select(finished, "messages").to_pylist()
    sampled = (
        finished.records.read("trajectories", 1).to_pylist() + finished.records.read("trajectories", 2).to_pylist()
    )
    texts = sorted((r["text"], tuple(r["token_ids"]), tuple(r["logprobs"])) for r in sampled)
    assert sorted((r["messages"][-1]["content"], tuple(r["token_ids"]), tuple(r["logprobs"])) for r in rows) == texts
    assert {tuple(r["messages"][0]) for r in rows} == {("role", "content")}
    assert {(r["outcome"], r["reward"]) for r in rows} == {("correct", 1.0), ("failed", 0.0)}
    for row in rows:
        assert row["group"] == f"tiny/r{row['round']:03d}/{row['problem_id']}"
        assert len(row["token_ids"]) == len(row["logprobs"]) > 0
    assert len({row["group"] for row in rows}) * 4 == len(rows)  # four samples a problem


@pytest.mark.skipif(not INSPECT.exists(), reason="Inspect is not installed: make inspect")
def test_inspect_reads_the_logs(finished: Run, tmp_path: Path) -> None:
    rows = select(finished, "inspect")
    assert write_logs(Store(finished.records.storage.path), rows, tmp_path / "logs") == 2
    command = [str(INSPECT), "-c", READ_LOGS, str(tmp_path / "logs")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    logs = json.loads(result.stdout.splitlines()[-1])
    assert [log["task"] for log in logs] == ["tiny-r001", "tiny-r002"]
    for number, log in enumerate(logs, start=1):
        of_round = [r for r in rows.to_pylist() if r["round"] == number]
        assert (log["status"], log["model"], log["epochs"]) == ("success", finished.config.model.path, 4)
        correct = sum(r["outcome"] == "correct" for r in of_round)
        assert log["accuracy"] == pytest.approx(correct / len(of_round))
        assert log["samples"] == [
            [
                *(r["problem_id"], r["sample"] + 1, r["messages"][-2]["content"], r["expected"], r["text"]),
                *({"stop": "stop", "length": "max_tokens"}[r["finish_reason"]],),
                *({"correct": "C", "failed": "I"}[r["outcome"]], r["answer"], r["n_tokens"]),
            ]
            for r in of_round
        ]


def test_a_single_log_holds_one_round(finished: Run, tmp_path: Path) -> None:
    store = Store(finished.records.storage.path)
    with pytest.raises(DataError, match=r"a log holds one round, and 2 were selected; add --where, or name a folder"):
        write_logs(store, select(finished, "inspect"), tmp_path / "log.json")
    assert list(tmp_path.iterdir()) == []
    rows = select(finished, "inspect", where="round = 2")
    assert write_logs(store, rows, tmp_path / "log.json") == 1
    log = json.loads((tmp_path / "log.json").read_text())
    assert (log["version"], log["eval"]["metadata"]["round"], len(log["samples"])) == (2, 2, len(rows))
    with pytest.raises(UserError, match="already exists"):
        write_logs(store, rows, tmp_path / "log.json")


@pytest.mark.slow
def test_trl_trains_on_pairs_and_on_conversations(finished: Run, tmp_path: Path) -> None:
    """One step of DPO on the preference pairs, and one of SFT on the conversations, as `datasets` loads them."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.data_utils import is_conversational

    model = str(REPO / "data/tiny/model")
    settings: dict[str, Any] = {"max_steps": 1, "report_to": [], "use_cpu": True, "per_device_train_batch_size": 2}
    for kind, trainer, config in (("preference", DPOTrainer, DPOConfig), ("sft", SFTTrainer, SFTConfig)):
        write_dataset(select(finished, kind), tmp_path / kind, kind, "A test.")  # type: ignore[arg-type]
        data = load_dataset(str(tmp_path / kind), split="train", cache_dir=str(tmp_path / "cache"))
        assert is_conversational(data[0])
        arguments = config(output_dir=str(tmp_path / "out"), bf16=False, gradient_checkpointing=False, **settings)
        loss = trainer(model=model, args=arguments, train_dataset=data).train().training_loss
        assert 0 < loss < 10
