"""A run: its configuration, its folder in the store, and `carry_out`, which runs every stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from ogls.config import ModelConfig, Recipe, RunConfig
from ogls.config.fingerprint import fingerprint, numerics
from ogls.digests import known_files, remember_files
from ogls.errors import StoreError
from ogls.models.adapter import BASE, WEIGHTS, Adapter
from ogls.models.load import resolve_device
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import TABLES, Problem, StageResult
from ogls.records.schema import RESULT_VERSION
from ogls.records.stages import STAGES_BY_NAME
from ogls.seeds import derive_seed
from ogls.stages import columns
from ogls.stages.contents import Contents, by_content, local_paths, read_contents, settle
from ogls.stages.kept_models import KeptModels
from ogls.stages.rounds import record_round
from ogls.stages.start import StartPoint, read_start_folder
from ogls.store import Store
from ogls.store.manifest import OPTIMIZER, Manifest
from ogls.store.writer import StageWriter

POLICY = "policy"  # the folder of adapters and optimizer states, listed in the manifest of updates


class Run:
    """What the stages of a run share. Cheap to create: a model is loaded only when a stage needs it."""

    may_redo_closed = False  # whether stages of closed rounds may be redone: only to restore files (`stages.check`)

    def __init__(self, config: RunConfig, models: KeptModels | None = None):
        """`models` keeps the loaded models of a process that carries out stage after stage; None: none are kept."""
        self._given, self._models = config, models
        self.store = Store(config.root)
        self.records = self.store.run(config.name)

    @cached_property
    def config(self) -> RunConfig:
        """The configuration. One that does not name imported rollouts goes on with those of the run."""
        rollout = self._given.rollout
        info = None if rollout.imported else self.records.read_info()
        imported = info["config"].get("rollout", {}).get("imported") if info else None
        if not imported:
            return self._given
        return self._given.model_copy(update={"rollout": rollout.model_copy(update={"imported": imported})})

    def open(self) -> str:
        """Start or resume the run. Returns a notice, or an empty string (see `RunStore.open`)."""
        identity, (contents, changed) = self.identity, self._contents
        files = known_files(local_paths(self.config))
        notices = [self.records.open(self.config, identity, contents=contents, files=files)]
        if changed:
            notices.append(f"{', '.join(changed)}: changed since the run began, which goes on with its own copy")
        return "; ".join(filter(None, notices))

    @cached_property
    def identity(self) -> RunConfig:
        """The configuration with contents in place of paths, for fingerprints."""
        return by_content(self.config, self._contents[0])

    @cached_property
    def _contents(self) -> tuple[Contents, list[str]]:
        """The content of every setting that names files, and the settings whose files have changed (`settle`)."""
        info = self.records.read_info() or {}
        remember_files(info.get("files", {}))
        found = read_contents(self.config)
        if "contents" not in info or self.records.manifest("problems", 0) is None:
            return found, []
        return settle(found, info["contents"], info["config"], self.config)

    def check_identity(self) -> None:
        """Raise StoreError if the configuration, or what its paths hold, is not what the run was started with."""
        if changes := self.records.changes(self.config, self.identity):
            raise StoreError(
                f"run {self.config.name} was started with other settings or files; restore them, or use another run "
                "name:\n  " + "\n  ".join(changes)
            )

    def seed(self, *purpose: str | int) -> int:
        """The seed for a purpose, derived from the seed of the run."""
        return derive_seed(self.config.seed, *purpose)

    @cached_property
    def _problems(self) -> Any:
        return self.records.read("problems", 0)

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split (train, holdout or a benchmark), in stored order."""
        return columns.to_problems(self._problems, split)

    def recipes(self) -> dict[str, Recipe]:
        """The recipe of every training problem, by its id."""
        steer = self.config.steer
        return {p.problem_id: steer.recipe_for(p.columns.get("source")) for p in self.problems("train")}

    def split_digest(self, split: str) -> str:
        """A fingerprint of the problems of one split: their texts and answers, in order."""
        return fingerprint([{k: v for k, v in vars(p).items() if k != "columns"} for p in self.problems(split)])

    def load_policy(self, round_: int | None = None, model: ModelConfig | None = None) -> Policy:
        """The model with the weights that `round_` ended with; None loads the base model.

        `model` are settings in place of those of the run, as for another device; a model with such settings is not
        kept.
        """
        settings = model or self.config.model

        def load() -> Policy:
            return Policy(settings, self.config.adapter, self.seed("adapter"))

        policy = self._kept("", load) if settings == self.config.model else load()
        policy.use_adapter(None if round_ is None else self.load_adapter(round_))
        return policy

    def load_other(self, path: str) -> Policy:
        """Another model that computes pools, by its path."""
        return self._kept(path, lambda: Policy(self.config.other_models()[path], None))

    def _kept(self, path: str, load: Callable[[], Policy]) -> Policy:
        """The model that is kept under `path`, or loaded."""
        return self._models.get(path, load, resolve_device(self.config.model)) if self._models else load()

    def release_memory(self) -> None:
        """Move the models that are kept from a GPU to the CPU until they are used again."""
        if self._models:
            self._models.release_memory()

    def start_point(self, round_: int) -> StartPoint:
        """Where a round starts: at the end of the previous round, unless the health stage has rolled back."""
        manifest = self.health_before(round_)
        if manifest is None:
            return StartPoint(round_ - 1, 1.0)
        restart = manifest.metrics["restart"] if manifest.round == round_ - 1 else None
        return StartPoint(round_ - 1 if restart is None else int(restart), float(manifest.metrics["rate"]))

    def health_before(self, round_: int) -> Manifest | None:
        """The newest health manifest before a round, or None. Rounds that are not evaluated have none."""
        manifests = (self.records.manifest("health", before) for before in range(round_ - 1, -1, -1))
        return next(filter(None, manifests), None)

    def prompter(self, tokenizer: Any) -> Prompter:
        """The prompter for this run's prompts and chat template."""
        return Prompter(tokenizer, self.config.prompts, self.config.model.thinking)

    def load_adapter(self, round_: int) -> Adapter | None:
        """The adapter that a round ended with. For round 0 it is `adapter.start`, or None for the base model.

        Raises StoreError if its hash differs from the recorded one.
        """
        if round_ == 0:
            return self._start_adapter
        adapter = Adapter.from_bytes(self.read_attachment(round_, WEIGHTS[self.config.adapter.kind]))
        if adapter.hash != (recorded := self.policy_hash(round_)):
            raise StoreError(
                f"run {self.config.name} round {round_}: the adapter's hash is {adapter.hash}, but {recorded} was "
                "trained; run the same training again to redo the round"
            )
        return adapter

    @cached_property
    def _start_adapter(self) -> Adapter | None:
        """The adapter in `adapter.start`, or None if that is empty. `prepare` stores a copy in the run."""
        if not self.config.adapter.start:
            return None
        manifest = self.records.manifest("problems", 0)
        if manifest and manifest.files_of(POLICY):
            return Adapter.from_bytes(self._read_file(manifest, WEIGHTS[self.config.adapter.kind]))
        return read_start_folder(self.config)

    def policy_hash(self, round_: int) -> str:
        """The hash of the adapter that a round ended with, as recorded when it was trained.

        Raises StoreError if the round is not trained.
        """
        if round_ == 0:
            return self._start_adapter.hash if self._start_adapter else BASE
        manifest = self.records.manifest("updates", round_)
        if manifest is None:
            raise StoreError(
                f"run {self.config.name} has not trained round {round_}; `ogls runs` lists the finished rounds"
            )
        return str(manifest.metrics["policy"])

    def read_attachment(self, round_: int, name: str) -> bytes:
        """A file that the train stage of a round saved. Raises StoreError if it is missing or damaged."""
        manifest = self.records.manifest("updates", round_)
        if manifest is None:
            raise StoreError(f"run {self.config.name} has not trained round {round_}")
        return self._read_file(manifest, name)

    def _read_file(self, manifest: Manifest, name: str) -> bytes:
        entry = next((f for f in manifest.files_of(POLICY) if f.path.endswith(f"/{name}")), None)
        content, damage = self.records.read_verified(entry) if entry else (b"", "is missing")
        if name == OPTIMIZER and manifest.dropped:
            raise StoreError(
                f"run {self.config.name} round {manifest.round}: the optimizer state was deleted on "
                f"{manifest.dropped[:10]} (storage.keep_optimizers, ogls gc), so no training can start from this "
                "round; its adapter is there: start a new run from it (adapter.start)"
            )
        if damage:
            raise StoreError(
                f"run {self.config.name} round {manifest.round}: {name} {damage}; `ogls check {self.config.name} "
                "--repair` restores what can be restored"
            )
        return content

    def is_closed(self, round_: int) -> bool:
        """Whether the next round has begun, so that nothing of this round may change any more.

        Imported rollouts exist before round 0 is evaluated; it is closed when round 1 is trained.
        """
        begins = "updates" if round_ == 0 and self.config.rollout.imported else "trajectories"
        return self.records.has_files(begins, round_ + 1)

    def digest(self, table: str, round_: int) -> str:
        """The digest of the output of a finished stage, for the fingerprint of the next one.

        Raises StoreError if the stage is not done.
        """
        manifest = self.records.manifest(table, round_)
        if manifest is None:
            stage = TABLES[table].stage
            raise StoreError(f"run {self.config.name} round {round_}: run the stage {stage} first, then this one")
        return manifest.digest

    def _is_past_states(self, round_: int) -> bool:
        """Whether every stage that reads the teacher states of a round is done.

        The states are by far the largest files of a round, and to hash them would take most of the time of a resume.
        """
        readers = ["targets", *(["style"] if self.config.style.enabled else [])]
        readers += ["updates"] if self.config.train.support == "full" else []
        return all(self.records.is_intact(table, round_) for table in readers)

    def fingerprint(self, table: str, inputs: Mapping[str, Any]) -> str:
        """The fingerprint of the stage that writes `table` from `inputs`."""
        return fingerprint(TABLES[table].stage, RESULT_VERSION, inputs)

    def carry_out(
        self, table: str, round_: int, inputs: Mapping[str, Any], work: Callable[[StageWriter], dict[str, Any]]
    ) -> StageResult:
        """Run the stage that writes `table`, unless its manifest proves that it is done.

        `inputs` has everything that decides the output; it is fingerprinted. `work` writes shards and returns metrics.
        The manifest is written last, so a stage that was interrupted is not done.

        Raises StoreError if the configuration is not that of the run, or if a stage of a round that later rounds are
        built on is damaged or has other inputs: that stage is never redone.
        """
        started = time.perf_counter()
        name = TABLES[table].stage
        stage_fingerprint = self.fingerprint(table, inputs)
        hash_states = table == "teacher_states" and not self._is_past_states(round_)
        status = self.records.status(table, round_, stage_fingerprint, hash_states)
        if status.manifest:
            seconds = float(status.manifest.metrics.get("seconds", 0))
            return StageResult(name, round_, status.manifest.rows, seconds, status.manifest.metrics, reused=True)
        self.check_identity()
        stage = STAGES_BY_NAME.get(name)
        closed = self.is_closed(round_) and not self.may_redo_closed
        if status.why and stage and not stage.diagnostic and closed:
            raise StoreError(
                f"run {self.config.name} round {round_}: {name} cannot be redone ({status.why}), because later rounds "
                f"are built on it; `ogls check {self.config.name} --repair` restores what can be restored"
            )
        notice = f"{name} r{round_:03d} is redone: {status.why}" if status.why else ""
        writer = StageWriter(self.records, TABLES[table], round_, stage_fingerprint, numerics(self.config))
        metrics = work(writer)
        if writer.workers:
            metrics["workers"] = dict(sorted(writer.workers.items()))
        if writer.kept and not notice:
            notice = f"{name} r{round_:03d} continued after {writer.kept} finished shards"
        seconds = writer.borrowed_seconds + time.perf_counter() - started
        manifest = writer.commit(name, {**metrics, "seconds": seconds})
        if closed:  # evaluated later: nobody publishes the round again
            record_round(self.records, round_)
        lost = "; ".join(dict.fromkeys(writer.notices))
        notices = " ".join(n for n in (notice, lost, metrics.get("notice", "")) if n)
        return StageResult(name, round_, manifest.rows, seconds, manifest.metrics, notice=notices, redone=status.why)


def open_run(root: str, name: str) -> Run:
    """An existing run, with the configuration that it was started with.

    Raises StoreError, listing the existing runs, if it does not exist.
    """
    store = Store(root)
    info = store.run(name).read_info()
    if info is None:
        existing = ", ".join(r.name for r in store.runs()) or "none"
        raise StoreError(f"no run {name} in {root}; existing runs: {existing}")
    return Run(RunConfig.model_validate({**info["config"], "root": root}))
