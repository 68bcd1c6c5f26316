"""A run under way: its configuration, its folder, and the frame that every stage is carried out in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from ogls.config import RunConfig
from ogls.config.fingerprint import differences, fingerprint
from ogls.errors import ModelError, StoreError
from ogls.models.adapter import BASE, WEIGHTS, Adapter, check_adapter_config
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import TABLES, Problem, StageResult
from ogls.records.schema import RESULT_VERSION
from ogls.seeds import derive_seed
from ogls.stages import columns
from ogls.store import Store
from ogls.store.manifest import Manifest
from ogls.store.storage import open_root
from ogls.store.writer import StageWriter

POLICY = "policy"  # the folder of adapters and optimizer states; the manifest of updates vouches for it


class StartPoint(NamedTuple):
    """Where a round starts: the round whose policy it goes on from, and the factor on the learning rate."""

    round: int
    rate: float


class Run:
    """What the stages of a run share. Cheap to make: models are loaded only where a stage needs one."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.store = Store(config.root)
        self.records = self.store.run(config.name)

    def seed(self, *purpose: str | int) -> int:
        return derive_seed(self.config.seed, *purpose)

    @cached_property
    def _problems(self) -> Any:
        return self.records.read("problems", 0)

    def problems(self, split: str) -> list[Problem]:
        return columns.to_problems(self._problems, split)

    def split_digest(self, split: str) -> str:
        """What stands for the problems of one split: their texts and answers, in order."""
        return fingerprint([vars(p) for p in self.problems(split)])

    def load_policy(self, round_: int | None = None) -> Policy:
        """The model, with the weights that `round_` ended with in use (None: the base)."""
        policy = Policy(self.config.model, self.config.adapter, self.seed("adapter"))
        policy.use_adapter(None if round_ is None else self.load_adapter(round_))
        return policy

    def start_point(self, round_: int) -> StartPoint:
        """Where a round starts: at the end of the one before, unless the health stage has rolled back."""
        manifest = self.health_before(round_)
        if manifest is None:
            return StartPoint(round_ - 1, 1.0)
        restart = manifest.metrics["restart"] if manifest.round == round_ - 1 else None
        return StartPoint(round_ - 1 if restart is None else int(restart), float(manifest.metrics["rate"]))

    def health_before(self, round_: int) -> Manifest | None:
        """The health manifest that was in force when a round began: not every round is evaluated and has one."""
        found = (self.records.manifest("health", before) for before in range(round_ - 1, -1, -1))
        return next(filter(None, found), None)

    def prompter(self, tokenizer: Any) -> Prompter:
        return Prompter(tokenizer, self.config.prompts, self.config.model.thinking)

    def load_adapter(self, round_: int) -> Adapter | None:
        """The adapter that a round ended with; round 0's is adapter.start or None, the base model.

        Raises StoreError if it is not the one recorded.
        """
        if round_ == 0:
            return self._start_adapter
        adapter = Adapter.from_bytes(self.read_attachment(round_, WEIGHTS[self.config.adapter.kind]))
        if adapter.hash != (recorded := self.policy_hash(round_)):
            raise StoreError(
                f"run {self.config.name} round {round_}: the adapter's hash is {adapter.hash}, but {recorded} was "
                "trained; run the same training again to have the round redone"
            )
        return adapter

    @cached_property
    def _start_adapter(self) -> Adapter | None:
        """The adapter to start from. Raises ModelError where the folder has none."""
        if not self.config.adapter.start:
            return None
        fs, path = open_root(self.config.adapter.start)
        name, about = WEIGHTS[self.config.adapter.kind], f"{path}/adapter_config.json"
        try:
            if self.config.adapter.kind == "lora" and fs.exists(about):
                check_adapter_config(json.loads(fs.cat_file(about)), self.config)
            return Adapter.from_bytes(fs.cat_file(f"{path}/{name}"))
        except OSError:
            raise ModelError(f"adapter.start: {self.config.adapter.start} holds no {name}") from None

    def policy_hash(self, round_: int) -> str:
        """The hash that was recorded when the round was trained."""
        if round_ == 0:
            return self._start_adapter.hash if self._start_adapter else BASE
        manifest = self.records.manifest("updates", round_)
        if manifest is None:
            raise StoreError(f"run {self.config.name} has not trained round {round_}; `ogls runs` lists what is there")
        return str(manifest.metrics["policy"])

    def read_attachment(self, round_: int, name: str) -> bytes:
        """A file that the train stage of a round attached."""
        manifest = self.records.manifest("updates", round_)
        entry = next((f for f in manifest.files_of(POLICY) if f.path.endswith(f"/{name}")), None) if manifest else None
        content, wrong = self.records.read_verified(entry) if entry else (b"", "is missing")
        if wrong:
            raise StoreError(f"run {self.config.name} round {round_}: {name} {wrong}; run the training again")
        return content

    def digest(self, table: str, round_: int) -> str:
        """What stands for a finished stage's output in the fingerprint of the next."""
        manifest = self.records.manifest(table, round_)
        if manifest is None:
            stage = TABLES[table].stage
            raise StoreError(f"run {self.config.name} round {round_}: run the stage {stage} first, then this one")
        return manifest.digest

    def carry_out(
        self, table: str, round_: int, inputs: Mapping[str, Any], work: Callable[[StageWriter], dict[str, Any]]
    ) -> StageResult:
        """Carry out the stage that writes `table`, unless its manifest proves that it is done.

        `inputs` is everything that decides the output; `work` writes shards and returns metrics. The manifest
        comes last: whatever ends `work` early leaves a stage that is not done.
        """
        started = time.perf_counter()
        name = TABLES[table].stage
        wanted = fingerprint(name, RESULT_VERSION, inputs)
        status = self.records.status(table, round_, wanted)
        if status.manifest:
            seconds = float(status.manifest.metrics.get("seconds", 0))
            return StageResult(name, round_, status.manifest.rows, seconds, status.manifest.metrics, reused=True)
        if status.state == "changed" and table == "problems":
            raise StoreError(
                f"run {self.config.name}: the problems have changed since the run began ({self.config.problems.source} "
                "or a benchmark); restore the files, or take another run name"
            )
        notice = f"{name} r{round_:03d} is redone: {status.why}" if status.why else ""
        writer = StageWriter(self.records, TABLES[table], round_, wanted)
        if writer.finished:
            notice = notice or f"{name} r{round_:03d} goes on after {len(writer.finished)} finished shards"
        metrics = work(writer)
        seconds = time.perf_counter() - started
        manifest = writer.commit(name, {**metrics, "seconds": seconds})
        result = StageResult(name, round_, manifest.rows, seconds, manifest.metrics)
        said = " ".join(n for n in (notice, metrics.get("notice", "")) if n)
        return replace(result, notice=said, redone=status.why)


def open_run(root: str, name: str) -> Run:
    """A run that exists, with the configuration it was started with. Raises StoreError naming those there are."""
    store = Store(root)
    about = store.run(name).read_info()
    if about is None:
        there = ", ".join(r.name for r in store.runs()) or "none"
        raise StoreError(f"no run {name} in {root}; there are: {there}")
    return Run(RunConfig.model_validate({**about["config"], "root": root}))


def is_complete(config: RunConfig) -> bool:
    """Whether this run has trained and evaluated all its rounds.

    Looks at manifests alone, so it is quick; only a training checks every file.
    """
    last = _last_examined(config)
    return last is not None and last.round >= config.rounds


def is_finished(config: RunConfig) -> bool:
    """Whether nothing is left to do: the run is complete, or its health has stopped it."""
    last = _last_examined(config)
    return last is not None and (last.round >= config.rounds or last.metrics["state"] == "stop")


def _last_examined(config: RunConfig) -> Manifest | None:
    """The newest health manifest of the run, if it is of this configuration."""
    records = Store(config.root).run(config.name)
    about = records.read_info()
    if about is None or differences(about["canonical"], config):
        return None
    return records.newest_manifest("health")
