"""What a checker says about an answer, and what the verifier says about a completion that failed."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.config import Verdict


@dataclass(frozen=True)
class Score:
    """The result of a custom checker that says more than True or False.

    `correct` may be None if there is a `reward`: then verify.threshold decides. `feedback` is a sentence about what is
    wrong, which a pool can read (`reads = "feedback"`). Raises ValueError if there is neither `correct` nor `reward`.
    """

    correct: bool | None = None
    reward: float | None = None
    feedback: str = ""

    def __post_init__(self) -> None:
        if self.correct is None and self.reward is None:
            raise ValueError("a Score needs correct or reward")

    def passes(self, threshold: float) -> bool:
        """Whether the answer counts as correct."""
        return bool(self.correct) if self.correct is not None else (self.reward or 0.0) >= threshold


def describe_failure(verdict: Verdict, answer: str | None, expected: str, reveal: bool) -> str:
    """A sentence about a completion that failed, for a pool that reads feedback; empty for any other verdict.

    The expected answer is in it only if `reveal`.
    """
    sentences = {
        "truncated": "The attempt was cut off before it came to an end.",
        "no_answer": r"The attempt has no final answer within \boxed{}.",
        "incorrect": f"Its final answer {answer} is not correct.",
    }
    sentence = sentences.get(verdict, "")
    return f"{sentence} The correct answer is {expected}." if sentence and reveal else sentence
