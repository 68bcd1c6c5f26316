"""Where problems come from, and the text put before the model."""

from __future__ import annotations

from pydantic import model_validator

from ogls.config.section import Section, setting


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
