"""What a run is told: one frozen model a section, every field described, unknown keys refused.

`configfile.py` reads these from TOML and `--set`. Nothing heavy is imported: validation answers at once. Here is
what a run computes; how it is watched and carried out is in `oversight.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ogls.oversight import ExecutionConfig, HealthConfig, StorageConfig, StyleConfig, TrackingConfig
from ogls.sampling import RolloutConfig, SamplingConfig, ServerConfig, VllmConfig
from ogls.section import Section, setting

__all__ = ["RolloutConfig", "SamplingConfig", "ServerConfig", "VllmConfig"]  # and all that is declared here

Pool = Literal["base", "reference", "correct", "incorrect"]
Verdict = Literal["correct", "incorrect", "no_answer", "truncated", "timeout", "error"]


class ModelConfig(Section):
    """The base model, which is also the teacher."""

    path: str = setting("data/tiny/model", "Folder or Hugging Face id of the base model.")
    revision: str | None = setting(None, "Revision of a Hugging Face id.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Type the weights are held in.")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where models run; auto takes CUDA if there is one.", operational=True
    )
    thinking: bool = setting(False, "The chat template's thinking flag, alike in every stage.")
    trust_remote_code: bool = setting(False, "Let the model's repository run its own code here.")


class AdapterConfig(Section):
    """What is trained. The head and the embeddings never are: teacher states are cached before the head."""

    kind: Literal["lora", "full"] = setting("lora", "lora, or full: every weight but head and embeddings.")
    start: str = setting("", "Folder of an adapter that round 0 is; empty: the base model itself.")
    rank: int = setting(64, "Rank of the LoRA matrices.", ge=1)
    alpha: int = setting(128, "LoRA scale; the update is alpha / rank * B A.", ge=1)
    modules: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Names of the projections that get LoRA matrices.",
        min_length=1,
    )


class Columns(Section):
    """Names of a data set's columns. A column that is not there counts as missing, save the problem's."""

    id: str = setting("id", "Unique id; where missing, it is made from the problem's text.")
    problem: str = setting("problem", "The question.")
    solution: str = setting("solution", "The reference solution.")
    answer: str = setting("answer", r"The answer: bare, in \boxed{}, or after GSM8K's ####.")


class DataSource(Section):
    """Where problems come from."""

    source: str = setting(
        "data/tiny/train.jsonl",
        "A .jsonl or .parquet file, a folder of such files (a data set of its own), or a Hugging Face id.",
    )
    subset: str | None = setting(None, "Configuration name of a Hugging Face dataset.")
    split: str = setting("train", "Split of a Hugging Face dataset.")
    columns: Columns = setting(Columns(), "Names of the columns.")
    limit: int | None = setting(None, "Take only the first so many problems.", ge=1)


class ProblemsConfig(DataSource):
    """The problems to train on."""

    after: tuple[str, ...] = setting((), "Runs of the same store whose training problems are left out.")
    per_round: int = setting(32, "Problems (groups) a round; they are gone through in a seeded order.", ge=1)
    holdout: int = setting(0, "Problems kept away from training as a benchmark named holdout.", ge=0)
    max_unusable: float = setting(0.05, "Share of unusable problems above which the source is refused.", ge=0, le=1)


class Benchmark(DataSource):
    """Held-out problems to evaluate on."""

    name: str = setting("tiny", "Name in tables and figures.", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    source: str = setting("data/tiny/test.jsonl", "As problems.source.")
    split: str = setting("test", "Split of a Hugging Face dataset.")


class PromptsConfig(Section):
    """The words put before the model. `{problem}` and `{exemplar}` are filled in, nothing else is."""

    system: str = setting("", "System message; empty for none.")
    student: str = setting(
        "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "The student's user message.",
    )
    exemplar: str = setting(
        "{problem}\n\nHere is an attempt at this problem:\n\n{exemplar}\n\n"
        "Now solve the problem yourself. Please reason step by step, and put your final answer within \\boxed{}.",
        "The teacher's user message around a rollout, correct or failed alike, so that its style cancels.",
    )
    reference: str = setting(
        "{problem}\n\nHere is a reference solution to this problem:\n\n{exemplar}\n\n"
        "Now solve the problem yourself. Please reason step by step, and put your final answer within \\boxed{}.",
        "The teacher's user message around the reference solution.",
    )

    @model_validator(mode="after")
    def _placeholders(self) -> PromptsConfig:
        for name, needed in (
            ("student", ("{problem}",)),
            ("exemplar", ("{problem}", "{exemplar}")),
            ("reference", ("{problem}", "{exemplar}")),
        ):
            missing = [p for p in needed if p not in getattr(self, name)]
            if missing:
                raise ValueError(f"prompts.{name} lacks {' and '.join(missing)}")
        return self


class VerifyConfig(Section):
    """Judging completions with math-verify."""

    workers: int = setting(2, "Worker processes.", ge=1, operational=True)
    timeout_seconds: float = setting(5.0, "Wall limit of one judgement; its worker is killed then.", gt=0)
    memory_mb: int = setting(2048, "Address space of a worker, in MiB.", ge=512)
    tail_chars: int = setting(2000, "Only so many last characters of a completion are looked at.", ge=64)
    require_boxed: bool = setting(True, r"Take answers from \boxed{} or #### only, not from loose text.")
    checker: str = setting(
        "",
        "A function of your own, module:name, that judges in place of math-verify: (answer, expected) -> bool. It runs "
        "in the same guarded worker processes; the module may lie in the working directory.",
        later=True,
        pattern=r"^([A-Za-z_][\w.]*:[A-Za-z_]\w*)?$",
    )
    failed: tuple[Verdict, ...] = setting(
        ("incorrect", "no_answer", "truncated"),
        "Verdicts that make a rollout a failure; any other but correct leaves it out of every pool.",
    )


class TeacherConfig(Section):
    """The teacher pass: who reads what."""

    weights: Literal["frozen", "live", "ema"] = setting(
        "frozen", "Teacher weights: the base model, the current policy, or an average of the policies so far."
    )
    ema_decay: float = setting(0.9, "ema: share of the old average kept a round.", ge=0, lt=1)
    anchor: Literal["teacher", "policy"] = setting(
        "policy", "Whose logits without privileged text the direction is added to (the base pool)."
    )
    pools: tuple[Pool, ...] = setting((), "Pools to cache besides those that the recipe weights.")
    max_exemplars: int = setting(8, "Most exemplars a pool and rollout.", ge=1)
    exemplar_tokens: int = setting(8192, "Exemplars longer than this are cut at their end.", ge=1)
    reference_exemplar: bool = setting(
        False, "The reference solution, where there is one, is an exemplar of the correct pool like any rollout."
    )
    empty_pool: Literal["skip", "reference"] = setting(
        "skip", "With a needed pool empty: leave the rollout out, or let the reference be the correct pool."
    )
    unanimous: Literal["skip", "anchor"] = setting(
        "skip",
        "Correct rollouts without a failed peer: leave them out, or train them with no direction, so that their target "
        "is the base pool at steer.temperature (needs train.rollouts = all or correct).",
    )
    batch_tokens: int = setting(16384, "Most tokens (padding included) in one forward pass.", ge=1)
    shard_groups: int = setting(8, "Groups whose states are in memory at once; also those of a shard.", ge=1)
    state_dtype: Literal["float16", "bfloat16", "float32"] = setting("float16", "Type of cached hidden states.")


class Recipe(Section):
    """Weights over the pools; they sum to 1 (DESIGN: one family, not many methods)."""

    base: float = setting(1.0, "No privileged text.")
    reference: float = setting(0.0, "The reference solution.")
    correct: float = setting(0.0, "Correct rollouts of the group.")
    incorrect: float = setting(0.0, "Failed rollouts of the group.")

    @model_validator(mode="after")
    def _sums_to_one(self) -> Recipe:
        total = self.base + self.reference + self.correct + self.incorrect
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights of a recipe sum to 1, not {total:g}")
        return self

    def pools(self) -> tuple[Pool, ...]:
        """The pools with a weight, in the order of the table."""
        order: tuple[Pool, ...] = ("base", "reference", "correct", "incorrect")
        return tuple(p for p in order if getattr(self, p) != 0)

    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by pool."""
        return {pool: getattr(self, pool) for pool in self.pools()}


class SteerConfig(Section):
    """The target: which recipe, how strong."""

    recipe: Literal["ogls-sd", "opsd", "sdpo", "contrastive", "none", "custom"] = setting(
        "ogls-sd", "A named recipe, or custom: the weights given in steer.weights."
    )
    strength: float = setting(0.5, "lambda of ogls-sd, a of contrastive; the others ignore it.")
    weights: Recipe | None = setting(None, "The weights of recipe custom.")
    temperature: float = setting(1.0, "The target's logits are divided by it: below 1 sharpens.", gt=0)
    support: int = setting(64, "K: tokens a target keeps besides its tail.", ge=1)
    batch_tokens: int = setting(1024, "Tokens whose full-vocabulary logits are alive at once.", ge=1)

    @model_validator(mode="after")
    def _weights_only_for_custom(self) -> SteerConfig:
        if (self.recipe == "custom") != (self.weights is not None):
            raise ValueError("steer.weights goes with steer.recipe = 'custom', and only with it")
        return self

    def resolved(self) -> Recipe:
        """The weights that the named recipe and the strength stand for."""
        a = self.strength
        named = {
            "ogls-sd": Recipe(base=1, correct=a, incorrect=-a),
            "opsd": Recipe(base=0, reference=1),
            "sdpo": Recipe(base=0, correct=1),
            "contrastive": Recipe(base=0, correct=1 + a, incorrect=-a),
            "none": Recipe(),
        }
        return self.weights or named[self.recipe]


class GrpoConfig(Section):
    """GRPO's surrogate (arXiv 2402.03300), used with train.objective = grpo."""

    clip_low: float = setting(0.2, "The importance ratio is clipped at 1 - clip_low.", gt=0, le=1)
    clip_high: float = setting(0.2, "The importance ratio is clipped at 1 + clip_high.", gt=0)
    normalise_std: bool = setting(
        True, "Divide advantages by the group's standard deviation; false is Dr. GRPO (arXiv 2503.20783)."
    )


class TrainConfig(Section):
    """One training round."""

    objective: Literal["distil", "grpo", "rft", "sft"] = setting(
        "distil",
        "distil: the teacher's targets. Without a teacher: grpo (clipped policy gradient), rft (rejection "
        "fine-tuning: NLL of correct rollouts), sft (NLL of the reference solutions of the round's problems).",
    )
    grpo: GrpoConfig = setting(GrpoConfig(), "GRPO's surrogate.")
    rollouts: Literal["incorrect", "correct", "mixed_groups", "all"] = setting(
        "mixed_groups", "Distil failed rollouts, correct ones, all rollouts of mixed groups, or all rollouts."
    )
    tokens: int = setting(1024, "Token cap T: only the first so many tokens of a rollout are distilled.", ge=1)
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = setting("reverse_kl", "D(target, student).")
    jsd_beta: float = setting(0.5, "jsd: weight of the target in the mixture.", gt=0, lt=1)
    support: Literal["top_k", "full"] = setting(
        "top_k", "Compare on the stored top-K and tail, or on the full vocabulary from the cached states."
    )
    tail_bucket: bool = setting(
        True, "top_k: compare the mass outside the support too, in one bucket; false renormalises on the support."
    )
    token_weights: Literal["uniform", "kl", "direction"] = setting(
        "uniform", "Weigh distilled tokens by their KL(target || base) or direction norm, over its mean in the step."
    )
    token_clip: float = setting(0.0, "A token's divergence is clipped at this, after its sum; 0 for not.", ge=0)
    pointwise_clip: float = setting(
        0.0,
        "forward_kl: clip every term of the sum at this (OPSD's tau = 0.05); 0 for not. For reproduction only: it "
        "reverses the gradient of clipped terms and ends in loops.",
        ge=0,
    )
    tail_weight: float = setting(0.0, "mu: weight of the NLL on the tail of correct rollouts.", ge=0)
    tail_tokens: int = setting(32, "Last tokens of a correct rollout, stop token included, in the tail NLL.", ge=1)
    epochs: int = setting(1, "Passes over the round's rollouts.", ge=1)
    batch_rollouts: int = setting(64, "Rollouts an optimizer step.", ge=1)
    micro_batch_tokens: int = setting(16384, "Most tokens (padding included) in one forward pass.", ge=1)
    head_tokens: int = setting(
        512, "Tokens whose full-vocabulary logits are alive at once, forward and backward.", ge=1, operational=True
    )
    gradient_checkpointing: bool = setting(
        False, "Keep no activations within a layer, and run it again in the backward pass.", operational=True
    )
    learning_rate: float = setting(1e-4, "AdamW learning rate, constant after warm-up.", gt=0)
    warmup_steps: int = setting(0, "Optimizer steps over which the rate rises linearly, once a run.", ge=0)
    weight_decay: float = setting(0.0, "AdamW weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this norm.", gt=0)

    @model_validator(mode="after")
    def _pointwise_clip_is_of_forward_kl(self) -> TrainConfig:
        if self.pointwise_clip and self.divergence != "forward_kl":
            raise ValueError("train.pointwise_clip goes with train.divergence = 'forward_kl' only")
        return self


class EvaluateConfig(SamplingConfig):
    """Evaluation after every round (and of the base model, as round 0)."""

    samples: int = setting(4, "k of avg@k: sampled completions a problem.", ge=1)
    every: int = setting(1, "Evaluate each so many rounds; the first and last always are.", ge=1, operational=True)
    base_kl: bool = setting(True, "Score the samples with the base model too, for the policy's KL to it.")
    bootstrap: int = setting(2000, "Bootstrap resamples over problems for the 95% interval.", ge=100)
    benchmarks: tuple[Benchmark, ...] = setting((), "What to evaluate on, besides problems.holdout.")

    @model_validator(mode="after")
    def _unique_names(self) -> EvaluateConfig:
        names = [b.name for b in self.benchmarks]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two benchmarks are named {', '.join(twice)}")
        return self


class RunConfig(Section):
    """Everything that decides what a run computes, and how."""

    name: str = setting("run", "Name of the run; its folder in the store.", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    root: str = setting("data/runs", "The store: a folder, s3://bucket/path, or another fsspec URL.", operational=True)
    seed: int = setting(0, "Every other seed derives from it.", ge=0)
    rounds: int = setting(8, "Rounds to train; a finished run goes on if this is raised.", ge=0, operational=True)
    model: ModelConfig = setting(ModelConfig(), "The base model.")
    adapter: AdapterConfig = setting(AdapterConfig(), "What is trained.")
    problems: ProblemsConfig = setting(ProblemsConfig(), "The problems to train on.")
    prompts: PromptsConfig = setting(PromptsConfig(), "The words put before the model.")
    rollout: RolloutConfig = setting(RolloutConfig(), "Sampling of training rollouts.")
    verify: VerifyConfig = setting(VerifyConfig(), "Judging completions.")
    teacher: TeacherConfig = setting(TeacherConfig(), "The teacher pass.")
    steer: SteerConfig = setting(SteerConfig(), "The target.")
    train: TrainConfig = setting(TrainConfig(), "One training round.")
    evaluate: EvaluateConfig = setting(EvaluateConfig(), "Evaluation.")
    style: StyleConfig = setting(StyleConfig(), "Style against substance.")
    health: HealthConfig = setting(HealthConfig(), "What is watched, and what is done about it.")
    tracking: TrackingConfig = setting(TrackingConfig(), "MLflow.")
    storage: StorageConfig = setting(StorageConfig(), "What is kept on disk.")
    execution: ExecutionConfig = setting(ExecutionConfig(), "How stages are carried out.")

    @model_validator(mode="after")
    def _has_a_benchmark(self) -> RunConfig:
        if not self.evaluate.benchmarks and not self.problems.holdout:
            raise ValueError("nothing to evaluate on: add an [[evaluate.benchmarks]] or set problems.holdout")
        if self.problems.holdout and any(b.name == "holdout" for b in self.evaluate.benchmarks):
            raise ValueError("a benchmark named holdout stands beside problems.holdout: rename it")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether a round has the stages teach and steer."""
        return self.train.objective == "distil"

    @property
    def method(self) -> str:
        """What the run does, in a word: its recipe, or its objective where there is no teacher."""
        return self.steer.recipe if self.has_teacher else self.train.objective

    def pools(self) -> tuple[Pool, ...]:
        """The pools that the teacher pass caches: base, those of the recipe, and those asked for."""
        order: tuple[Pool, ...] = ("base", "reference", "correct", "incorrect")
        wanted = {"base", *self.steer.resolved().pools(), *self.teacher.pools}
        return tuple(p for p in order if p in wanted)
