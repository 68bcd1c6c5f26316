"""Configuration: shipped files load, errors explain mistakes, fingerprints contain the settings that affect results."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, TINY

from ogls.config import RunConfig, Section, build_config, load_config, to_toml
from ogls.config.fingerprint import _kinds, canonical_json, differences, fingerprint
from ogls.config.redact import redact_credentials
from ogls.errors import ConfigError

RUNS = sorted((REPO / "deployments" / "runs").glob("*.toml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_shipped_configurations_parse_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.toml"
    copy.write_text(to_toml(config))
    assert load_config(copy) == config


def sections(model: type[Section]) -> list[type[Section]]:
    """Return a section class and, recursively, the section classes of its fields."""
    inner = [f.annotation for f in model.model_fields.values()]
    return [model, *(s for i in inner if isinstance(i, type) and issubclass(i, Section) for s in sections(i))]


def test_every_field_is_described_and_read() -> None:
    config_files = set((REPO / "ogls" / "config").glob("*.py"))
    files = {p for d in ("ogls", "tasks", "flows") for p in (REPO / d).rglob("*.py")}
    sources = "\n".join(p.read_text() for p in files - config_files)
    config = "\n".join(p.read_text() for p in config_files)
    for section in sections(RunConfig):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"
            is_read = f".{name}" in sources or f"self.{name}" in config
            assert is_read, f"{section.__name__}.{name} is never read"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("trian.epochs=1", "trian: unknown key; did you mean train?"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1 (got 0)"),
        ("train.divergence=kl", "train.divergence: Input should be 'forward_kl', 'reverse_kl' or 'jsd' (got 'kl')"),
        ("steer.recipe=custom", "steer.weights must be set if steer.recipe = 'custom', and only then"),
        ("prompts.exemplar=hello", "prompts.exemplar must contain {problem} and {exemplar}"),
        ("evaluate.benchmarks=[]", "nothing to evaluate on"),
        ("verify.answer_pattern='('", "verify.answer_pattern is not a valid regular expression"),
        ("teacher.exemplar_pattern='('", "teacher.exemplar_pattern is not a valid regular expression"),
        ("verify.answer_pattern='(a)(b)'", "verify.answer_pattern has 2 groups; mark one with (...)"),
        ("name=../x", "name: String should match pattern"),
        ("train.epochs", "write section.key=value"),
        ("name.first=1", "name is a value, not a section"),
    ],
)
def test_mistakes_are_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TINY, [override])
    assert message in str(error.value)


def test_an_unknown_key_in_a_list_of_tables_is_reported_with_its_index() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.benchmarks\.0\.sorce: unknown key; did you mean source\?"):
        build_config({"evaluate": {"benchmarks": [{"name": "a", "sorce": "b"}]}})


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml: .*line 1"):
        load_config(tmp_path / "bad.toml")


def test_recipes_sum_to_one() -> None:
    custom = {"recipe": "custom", "weights": {"base": 1.0, "correct": 0.5}}
    with pytest.raises(ConfigError, match=r"steer\.weights: recipe weights must sum to 1, but they sum to 1\.5"):
        build_config({"problems": {"holdout": 5}, "steer": custom})


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        ("ogls-sd", (1, 0, 0.7, -0.7)),
        ("opsd", (0, 1, 0, 0)),
        ("sdpo", (0, 0, 1, 0)),
        ("contrastive", (0, 0, 1.7, -0.7)),
        ("none", (1, 0, 0, 0)),
    ],
)
def test_named_recipes_match_the_design(recipe: str, weights: tuple) -> None:
    resolved = load_config(TINY, [f"steer.recipe={recipe}", "steer.strength=0.7"]).steer.to_recipe()
    assert (resolved.base, resolved.reference, resolved.correct, resolved.incorrect) == pytest.approx(weights)


def test_a_later_setting_at_its_default_is_not_in_the_fingerprint() -> None:
    config = build_config({"evaluate": {"benchmarks": [{}]}})
    assert "checker" not in canonical_json(config)
    stored = json.loads(canonical_json(config))[0]
    changed = build_config({"evaluate": {"benchmarks": [{}]}, "verify": {"checker": "mine:equal"}})
    assert fingerprint(changed) != fingerprint(config)
    assert differences(stored, changed) == ["verify.checker: '(not set)' -> 'mine:equal'"]


def test_operational_settings_do_not_affect_fingerprint_or_differences() -> None:
    config = load_config(TINY)
    operational = load_config(TINY, ["root=s3://elsewhere", "rounds=99", "tracking.enabled=false", "verify.workers=7"])
    changed = load_config(TINY, ["train.learning_rate=0.5"])
    assert fingerprint(config) == fingerprint(operational) != fingerprint(changed)
    stored = json.loads(canonical_json(config))[0]
    assert differences(stored, operational) == []
    assert differences(stored, changed) == [f"train.learning_rate: {config.train.learning_rate!r} -> 0.5"]


def test_help_and_validation_import_no_heavy_package() -> None:
    heavy = "torch", "transformers", "mlflow", "prefect", "vllm", "datasets"
    code = f"import sys, flows.cli, ogls.config, ogls.store;print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_is_fast() -> None:
    """It takes about a second on an idle machine; the bound is loose because test machines are shared."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "flows.cli", "--help"], capture_output=True, check=True)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("uri", ["http://user:hidden@host:5000", "https://host/x?token=hidden"])
def test_credentials_in_the_tracking_uri_are_rejected_and_not_printed(uri: str) -> None:
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as error:
        build_config({}, [f"tracking.uri={uri}"])
    assert "hidden" not in str(error.value)


def test_credentials_are_removed_from_urls() -> None:
    text = 'POST http://me:pw@host:5000/api?token=abc "s3://k:s@bucket/x?sig=1" sqlite:///data/x.db'
    assert redact_credentials(text) == 'POST http://host:5000/api "s3://bucket/x" sqlite:///data/x.db'


def test_a_file_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "a"\n[problems]\nholdout = 3\nper_round = 5\n[train]\nepochs = 2\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\nname = "b"\n[problems]\nper_round = 7\n')
    config = load_config(tmp_path / "b.toml")
    assert (config.name, config.problems.holdout, config.problems.per_round, config.train.epochs) == ("b", 3, 7, 2)
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    with pytest.raises(ConfigError, match=r"b\.toml: circular extends: b\.toml -> a\.toml -> b\.toml"):
        load_config(tmp_path / "b.toml")
    (tmp_path / "b.toml").write_text('extends = "c.toml"\n')
    with pytest.raises(ConfigError, match=r"no configuration file .*c\.toml"):
        load_config(tmp_path / "b.toml")


def test_errors_of_a_running_run_advise_only_what_may_be_changed_then() -> None:
    """Identity settings may be changed in a new run only, and the text says so."""
    kinds = dict(_kinds(RunConfig))
    advice = re.compile(r"\b(?:lower|raise|set)\b[^;.]*?\b([a-z_]+\.[a-z_.]+[a-z])")
    wrong = []
    for package in ("distillation", "training", "stages", "analysis", "verifiers", "evaluation"):
        for path in (REPO / "ogls" / package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    text = "".join(str(v.value) for v in node.values if isinstance(v, ast.Constant))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                    text = node.value
                else:
                    continue
                named = {name for name in advice.findall(text) if kinds.get(name) == "identity"}
                if named and "new run" not in text and "another run" not in text:
                    wrong.append((path.name, text))
    assert wrong == []


def test_extends_must_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("extends = 5\n")
    with pytest.raises(ConfigError, match=r"c\.toml: extends is the path of another configuration file, not 5"):
        load_config(tmp_path / "c.toml")


def test_a_wrong_pattern_gives_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, ["style.classes=[{name='a', pattern='('}]"])
    assert "is not a valid regular expression" in str(caught.value)
    assert "errors)" not in str(caught.value)
    with pytest.raises(ConfigError, match="at least 1 item"):
        load_config(TINY, ["style.classes=[]"])


def test_an_empty_root_is_refused() -> None:
    with pytest.raises(ConfigError, match="root: String should have at least 1 character"):
        load_config(TINY, ["root="])


def test_an_override_reaches_into_an_array() -> None:
    config = load_config(TINY, ["evaluate.benchmarks.0.limit=7", "evaluate.benchmarks.0.name=few"])
    assert [(b.name, b.limit) for b in config.evaluate.benchmarks] == [("few", 7)]
    for key in ("evaluate.benchmarks.1.limit", "evaluate.benchmarks.few.limit", "evaluate.benchmarks.7"):
        with pytest.raises(ConfigError, match="is no entry of the array; entries: 0 to 0"):
            load_config(TINY, [f"{key}=1"])
