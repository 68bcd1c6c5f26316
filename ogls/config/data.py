"""Problem sources and prompt templates."""

from __future__ import annotations

from pydantic import model_validator

from ogls.config.section import Section, setting


class Columns(Section):
    """Column names of a data set. Only the problem column is required; other missing columns count as empty."""

    id: str = setting("id", "Column of the unique id. Without it, the id is a hash of the problem's text.")
    problem: str = setting("problem", "Column of the problem's text.")
    solution: str = setting("solution", "Column of the reference solution.")
    answer: str = setting(
        "answer",
        r"Column of the answer: bare, in \boxed{}, or after GSM8K's ####. If it is empty, the answer is taken from the "
        "solution.",
    )


class DataSource(Section):
    """A data set to read problems from."""

    source: str = setting(
        "data/tiny/train.jsonl",
        "A .jsonl file, a .parquet file, a local dataset folder, or the id of a Hugging Face dataset.",
    )
    subset: str | None = setting(None, "Configuration name of a Hugging Face dataset.")
    revision: str | None = setting(
        None,
        "Revision (branch, tag or commit) of a Hugging Face dataset.",
        later=True,
    )
    split: str = setting("train", "Split of a Hugging Face dataset.")
    columns: Columns = setting(Columns(), "Column names of the data set.")
    limit: int | None = setting(None, "Use only the first N rows.", ge=1)


class ProblemsConfig(DataSource):
    """The problems to train on."""

    after: tuple[str, ...] = setting(
        (), "Names of runs in the same store. Problems that these runs trained on are excluded."
    )
    per_round: int = setting(
        32, "Problems (groups) per round. Each pass over the problems uses its own seeded order.", ge=1
    )
    holdout: int = setting(
        0, "Number of problems to exclude from training and to use as a benchmark named holdout.", ge=0
    )
    max_unusable: float = setting(
        0.05,
        "Maximum share of unusable problems (answer cannot be verified, or text too long) in a training or benchmark "
        "source; above it, the run fails.",
        ge=0,
        le=1,
    )


class Benchmark(DataSource):
    """Held-out problems to evaluate on."""

    name: str = setting("tiny", "Name in tables and figures.", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    source: str = setting(
        "data/tiny/test.jsonl",
        "A .jsonl file, a .parquet file, a local dataset folder, or the id of a Hugging Face dataset.",
    )
    split: str = setting("test", "Split of a Hugging Face dataset.")


class PromptsConfig(Section):
    """Prompt templates. `{problem}`, `{exemplar}` and `{feedback}` are replaced; other braces are left unchanged."""

    system: str = setting("", "System message. Empty: no system message.")
    student: str = setting(
        "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "User message of the student. Must contain {problem}.",
    )
    exemplar: str = setting(
        "{problem}\n\nHere is an attempt at this problem:\n\n{exemplar}\n\n"
        "Now solve the problem yourself. Please reason step by step, and put your final answer within \\boxed{}.",
        "User message of the teacher with a rollout as the exemplar. Must contain {problem} and {exemplar}. Correct "
        "and failed rollouts use the same template, so that its style cancels in their difference.",
    )
    reference: str = setting(
        "{problem}\n\nHere is a reference solution to this problem:\n\n{exemplar}\n\n"
        "Now solve the problem yourself. Please reason step by step, and put your final answer within \\boxed{}.",
        "User message of the teacher with the reference solution as the exemplar. Must contain {problem} and "
        "{exemplar}.",
    )

    feedback: str = setting(
        "{problem}\n\nHere is an attempt at this problem:\n\n{exemplar}\n\nAbout this attempt: {feedback}\n\n"
        "Now solve the problem yourself. Please reason step by step, and put your final answer within \\boxed{}.",
        "User message of the teacher with the rollout itself and the verifier's feedback. Must contain {problem}, "
        "{exemplar} and {feedback}.",
        later=True,
    )

    @model_validator(mode="after")
    def _check_placeholders(self) -> PromptsConfig:
        for name, placeholders in (
            ("student", ("{problem}",)),
            ("exemplar", ("{problem}", "{exemplar}")),
            ("reference", ("{problem}", "{exemplar}")),
            ("feedback", ("{problem}", "{exemplar}", "{feedback}")),
        ):
            missing = [p for p in placeholders if p not in getattr(self, name)]
            if missing:
                raise ValueError(f"prompts.{name} must contain {' and '.join(missing)}")
        return self
