"""What the settings that name files hold: digests that identify a run in place of paths.

A model, a data set or an adapter may be moved while a run is interrupted. Its content may not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ogls.config import AdapterConfig, DataSource, ModelConfig, PoolConfig, RunConfig, TeacherConfig
from ogls.custom import function_content
from ogls.digests import path_digest
from ogls.hub import prepare_hub
from ogls.models.adapter import WEIGHTS

S = TypeVar("S", bound=DataSource)
Contents = Mapping[str, str]  # by dotted setting; a setting whose content cannot be read now is left out


def read_contents(config: RunConfig) -> dict[str, str]:
    """The content of every setting that names files."""
    found = {
        "adapter.start": adapter_content(config.adapter),
        "problems.source": source_content(config.problems),
        **{f"evaluate.benchmarks.{b.name}": source_content(b) for b in config.evaluate.benchmarks},
        "train.loss": function_content(config.train.loss),
    }
    return {**worker_contents(config), **{setting: content for setting, content in found.items() if content}}


def worker_contents(config: RunConfig) -> dict[str, str]:
    """The content of the settings that name files which every worker needs; everything else is in the store."""
    found = {
        "model.path": model_content(config.model),
        "verify.checker": function_content(config.verify.checker),
        **{f"teacher.pools.{p.name}": model_content(config.pool_model(p)) for p in _with_model(config)},
    }
    return {setting: content for setting, content in found.items() if content}


def local_paths(config: RunConfig) -> list[Path]:
    """The local files and folders that `read_contents` reads."""
    sources = [
        config.model.path,
        config.adapter.start or ".nothing",
        config.problems.source,
        *(b.source for b in config.evaluate.benchmarks),
        *(p.model for p in _with_model(config)),
    ]
    return [Path(s) for s in sources if Path(s).exists()]


def model_content(model: ModelConfig) -> str:
    """A digest of a model folder, or the commit of a Hugging Face id; empty if the model cannot be found."""
    if Path(model.path).is_dir():
        return f"content:{path_digest(Path(model.path))[:32]}"
    from transformers import AutoConfig

    prepare_hub(model.path)
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError):
        return ""  # loading the model gives the error
    commit = getattr(config, "_commit_hash", None)
    return f"{model.path}@{commit}" if commit else ""


def adapter_content(adapter: AdapterConfig) -> str:
    """A digest of the weights of the start adapter; empty without one, or if it is not found.

    An adapter in another store is identified by its URL: it would have to be downloaded at every stage.
    """
    weights = Path(adapter.start, WEIGHTS[adapter.kind])
    return f"content:{path_digest(weights)[:32]}" if adapter.start and weights.is_file() else ""


def source_content(source: DataSource) -> str:
    """A digest of a local file or folder of problems, or the commit of a Hugging Face dataset; empty if not found."""
    if Path(source.source).exists():
        return f"content:{path_digest(Path(source.source))[:32]}"
    if source.source.count("/") != 1:
        return ""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    prepare_hub(source.source)
    try:
        commit = HfApi().dataset_info(source.source, revision=source.revision, timeout=10).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return ""
    return f"{source.source}@{commit}" if commit else ""


def by_content(config: RunConfig, contents: Contents) -> RunConfig:
    """The configuration with contents in place of paths, for fingerprints. It is not valid for anything else."""
    model = {"path": contents["model.path"], "revision": None} if "model.path" in contents else {}
    benchmarks = tuple(_source(b, contents, f"evaluate.benchmarks.{b.name}") for b in config.evaluate.benchmarks)
    sections = {
        "model": config.model.model_copy(update=model),
        "adapter": config.adapter.model_copy(update={"start": contents.get("adapter.start", config.adapter.start)}),
        "problems": _source(config.problems, contents, "problems.source"),
        "evaluate": config.evaluate.model_copy(update={"benchmarks": benchmarks}),
        "teacher": _pools_by_content(config, contents),
        "verify": config.verify.model_copy(update={"checker": contents.get("verify.checker", config.verify.checker)}),
        "train": config.train.model_copy(update={"loss": contents.get("train.loss", config.train.loss)}),
    }
    return config.model_copy(update=sections)


def _with_model(config: RunConfig) -> list[PoolConfig]:
    """The declared pools that another model computes."""
    return [p for p in config.teacher.pools if not isinstance(p, str) and p.model]


def _pools_by_content(config: RunConfig, contents: Contents) -> TeacherConfig:
    def by_content_of(pool: str | PoolConfig) -> str | PoolConfig:
        content = "" if isinstance(pool, str) else contents.get(f"teacher.pools.{pool.name}", "")
        if isinstance(pool, str) or not content:
            return pool
        return pool.model_copy(update={"model": content, "revision": None})

    return config.teacher.model_copy(update={"pools": tuple(map(by_content_of, config.teacher.pools))})


def _source(source: S, contents: Contents, setting: str) -> S:
    if setting not in contents:
        return source
    return source.model_copy(update={"source": contents[setting], "revision": None})


def settle(
    found: Contents, recorded: Contents, before: Mapping[str, Any], now: RunConfig
) -> tuple[Contents, list[str]]:
    """The contents that identify a prepared run, and the settings whose files have changed without effect on it.

    A run has its own copy of its problems and of its start adapter, so it goes on without the originals. A model, a
    checker or a loss that cannot be found now is taken to be the recorded one; using it gives the error.
    """
    after = now.model_dump(mode="json")
    kept, changed = {}, []
    for key, content in recorded.items():
        used = key in ("model.path", "verify.checker", "train.loss") or key.startswith("teacher.pools.")
        copied = not used
        if _same(before, after, key) and (copied or key not in found):
            kept[key] = content
            changed += [key] if found.get(key, content) != content else []
    return {**found, **kept}, changed


def _same(before: Any, after: Any, key: str) -> bool:
    """Whether two configurations have the same value of a dotted setting."""
    for part in key.split(".", 2):
        if isinstance(before, list):  # benchmarks and pools, by name
            before, after = ([e for e in entries if _is_named(e, part)] for entries in (before, after))
        else:
            before, after = before[part], after[part]
    return bool(before == after)


def _is_named(entry: Any, name: str) -> bool:
    return isinstance(entry, Mapping) and entry["name"] == name
