"""Resuming: nothing that is finished is redone, whatever is damaged or configured later; `ogls check` finds damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import REPO, ROUND, carry_out, content, small_config
from history import counted, make_history
from typer.testing import CliRunner

from flows.cli import app
from ogls.config import RunConfig
from ogls.config.fingerprint import numerics
from ogls.errors import HealthStop, StoreError
from ogls.stages.check import find_damage, repair
from ogls.stages.health import raise_if_stopped
from ogls.stages.registry import STAGES
from ogls.stages.resume import is_trained, resume_round
from ogls.stages.run import Run, open_run

GOLDEN = REPO / "tests" / "golden" / "store-0.2.0"  # round 3 has been sampled, verified and taught


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Run:
    """A copy of the finished run that a test may damage."""
    shutil.copytree(Path(finished.records.storage.path) / "tiny", tmp_path / "tiny")
    return Run(small_config(tmp_path))


def resume(config: RunConfig) -> dict[str, bool]:
    """Resume a run; whether each stage was reused, by "stage round"."""
    run = Run(config)
    run.open()
    reused = {"prepare 0": STAGES["prepare"](run, 0).reused}
    for round_ in range(resume_round(run), config.rounds + 1):
        for name in ROUND[-2:] if is_trained(run, round_) else ROUND:
            reused[f"{name} {round_}"] = STAGES[name](run, round_).reused
    return reused


def test_a_half_finished_run_of_version_0_2_0_goes_on_with_nothing_redone(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    run = open_run(str(tmp_path), "half")
    before = content(run)
    reused = resume(run.config)
    done = ["prepare 0", "sample 3", "verify 3", "teach 3"]
    assert reused == {name: name in done for name in [*done, *(f"{n} 3" for n in ROUND[3:])]}
    assert {name: files for name, files in content(run).items() if name in before} == before
    assert resume(run.config) == {"prepare 0": True, "evaluate 3": True, "health 3": True}


def test_an_input_that_was_redone_redoes_the_stages_of_an_older_version(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "half/trajectories/round=003/part-0000.parquet").unlink()
    reused = resume(open_run(str(tmp_path), "half").config)
    assert [name for name, kept in reused.items() if kept] == ["prepare 0"]


NUMERICS = (
    *("train.micro_batch_tokens=64", "train.head_tokens=32", "train.gradient_checkpointing=true"),
    *("teacher.batch_tokens=512", "teacher.shard_groups=2", "steer.batch_tokens=100"),
    *("rollout.batch_size=8", "evaluate.batch_size=8", "model.device=cpu"),
)


def test_numerics_settings_may_change_between_stages(copy: Run, tmp_path: Path) -> None:
    """Finished stages stay valid, manifests record the values, and the change is said once."""
    changed = small_config(tmp_path, "rounds=3", *NUMERICS)
    notice = Run(changed).open()
    assert notice.startswith("run tiny goes on with other numerics settings: ")
    assert "train.micro_batch_tokens 16384 -> 64" in notice
    assert Run(changed).open() == ""
    reused = resume(changed)
    assert [name for name, kept in reused.items() if kept] == ["prepare 0", "evaluate 2", "health 2"]
    for table in ("trajectories", "updates"):
        old, new = (copy.records.manifest(table, r) for r in (2, 3))
        assert old
        assert new
        assert old.numerics == numerics(copy.config)
        assert new.numerics == numerics(changed) != old.numerics


def test_a_stage_that_is_half_done_keeps_its_shards_if_they_are_divided_in_the_same_way(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    run = carry_out(small_config(tmp_path), rounds=0)
    for overrides, kept in ((("teacher.batch_tokens=512",), 1), (("rollout.batch_size=8",), 0)):
        with pytest.raises(KeyboardInterrupt):
            STAGES["sample"](run, 1, interrupt)
        changed = Run(small_config(tmp_path, *overrides))
        result = STAGES["sample"](changed, 1)
        assert result.notice == (f"sample r001 continued after {kept} finished shards" if kept else "")
        assert result.rows == 32
        shutil.rmtree(run.records.url("trajectories/round=001"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["health.accuracy=rollback", "health.short=rollback", "health.min_length=5"],
        ["evaluate.every=2"],
        ["style.classes=[{name='digits',pattern='[0-9]'}]", "storage.keep_states=1"],
    ],
    ids=["health", "evaluate.every", "style"],
)
def test_operational_settings_rewrite_no_finished_round(copy: Run, tmp_path: Path, overrides: list[str]) -> None:
    """They count from the next round on."""
    if "storage.keep_states=1" in overrides:
        from ogls.store.retention import drop_files

        drop_files(copy.records, 1)
        drop_files(copy.records, 2)
    before = content(copy)
    changed = small_config(tmp_path, "rounds=3", *overrides)
    reused = resume(changed)
    assert {name for name, kept in reused.items() if kept} == {"prepare 0", "evaluate 2", "health 2"}
    assert {name: files for name, files in content(copy).items() if name in before} == before
    if "health.short=rollback" in overrides:
        decided = Run(changed).records.manifest("health", 3)
        assert decided
        assert decided.metrics["state"] == "rollback"  # the length is below five times the base model's


def test_a_round_evaluated_later_gets_no_decision(copy: Run, tmp_path: Path) -> None:
    shutil.rmtree(copy.records.url("health/round=001"))
    shutil.rmtree(copy.records.url("scores/round=001"))
    assert not STAGES["evaluate"](copy, 1).reused
    with pytest.raises(StoreError, match="has no health decision, and round 2 has begun"):
        STAGES["health"](copy, 1)


def test_a_stop_holds_until_the_health_settings_change(copy: Run, tmp_path: Path) -> None:
    stopping = small_config(tmp_path, "rounds=3", "health.short=stop", "health.min_length=5")
    run = carry_out(stopping)
    with pytest.raises(HealthStop):
        raise_if_stopped(run, 3)
    raise_if_stopped(Run(small_config(tmp_path, "rounds=4", "health.short=warn", "health.min_length=5")), 3)


def test_a_resume_costs_the_same_after_10_and_after_60_rounds(finished: Run, tmp_path: Path) -> None:
    """In requests and bytes: of a resume that finds everything done, and of one that begins the next round."""
    costs = []
    for rounds in (10, 60):
        make_history(finished, str(tmp_path / str(rounds)), rounds - 1)
        carry_out(small_config(tmp_path / str(rounds), f"rounds={rounds}"))  # a real round after the copies
        with counted() as done:
            reused = resume(small_config(tmp_path / str(rounds), f"rounds={rounds}"))
        assert reused == {"prepare 0": True, f"evaluate {rounds}": True, f"health {rounds}": True}
        with counted() as begun:
            run = Run(small_config(tmp_path / str(rounds), f"rounds={rounds + 1}"))
            run.open()
            assert resume_round(run) == rounds
            assert is_trained(run, rounds)
            STAGES["sample"](run, rounds + 1)
        read = {path.split("/")[2] for path in done.paths + begun.paths if "/round=" in path}
        best = run.records.newest_manifest("health").metrics["best"]  # a health decision compares with it
        assert read <= {f"round={n:03d}" for n in (0, best, rounds - 1, rounds, rounds + 1)}
        costs.append((done.requests, begun.requests, done.read_bytes, begun.read_bytes))
    assert costs[0][:2] == costs[1][:2]
    assert costs[1][2] == pytest.approx(costs[0][2], rel=0.01)  # other rollouts were sampled
    assert costs[1][3] == pytest.approx(costs[0][3], rel=0.01)


def test_a_damaged_file_of_an_old_round_redoes_nothing_and_is_restored(
    copy: Run, finished: Run, tmp_path: Path
) -> None:
    damaged = ["trajectories/round=001/part-0001.parquet", "policy/round=001/adapter_model.safetensors"]
    for path in damaged:
        (tmp_path / "tiny" / path).unlink()
    (tmp_path / "tiny/targets/round=001/manifest.json").write_text("{")
    assert resume(copy.config) == {"prepare 0": True, "evaluate 2": True, "health 2": True}
    with pytest.raises(StoreError, match=r"sample cannot be redone \(.* is missing\), because later rounds are built"):
        STAGES["sample"](copy, 1)
    found = find_damage(copy)
    assert [d.path for d in found] == [damaged[0], "targets/round=001/manifest.json", damaged[1]]
    assert {d.consequence.partition(";")[0] for d in found} == {"training does not need it"}
    assert {reason for _, reason in repair(copy, found)} == {""}
    assert find_damage(copy) == []
    assert content(copy) == content(finished)


def test_what_cannot_be_computed_again_to_the_same_bytes_is_not_restored(copy: Run, tmp_path: Path) -> None:
    """As on another device: the stage gives other rows now."""
    path = tmp_path / "tiny/updates/round=001/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    ((damage, reason),) = repair(copy, find_damage(copy))
    assert damage.problem == "has another checksum"
    assert reason.startswith("computed again, it has other bytes")
    assert json.loads(path.read_text()) == manifest


def test_a_damaged_policy_to_start_from_is_an_error_before_any_work(copy: Run, tmp_path: Path) -> None:
    STAGES["sample"](Run(small_config(tmp_path, "rounds=3")), 3)
    (tmp_path / "tiny/policy/round=002/optimizer.safetensors").unlink()
    with pytest.raises(StoreError, match=r"round 2: optimizer\.safetensors is missing; `ogls check tiny --repair`"):
        resume(small_config(tmp_path, "rounds=3"))
    (found,) = find_damage(copy)
    assert found.consequence.startswith("training cannot continue")


def test_the_check_command_reports_and_restores(copy: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny/verdicts/round=001/part-0000.parquet").unlink()
    command = ["check", "tiny", "--root", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "verify r001: verdicts/round=001/part-0000.parquet is missing: training does not need it" in result.stdout
    result = CliRunner().invoke(app, [*command, "--repair"])
    assert "verdicts/round=001/part-0000.parquet: restored" in result.stdout
    assert result.exit_code == 0
    assert "every file is as its manifest lists it" in CliRunner().invoke(app, command).stdout


def test_a_run_without_a_finished_stage_accepts_another_configuration(tmp_path: Path) -> None:
    mistyped = Run(small_config(tmp_path, "model.path=data/tiny/modle"))
    mistyped.open()
    with pytest.raises(Exception, match="cannot load the model"):
        STAGES["prepare"](mistyped, 0)
    assert Run(small_config(tmp_path)).open() == ""
