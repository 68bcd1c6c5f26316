"""Building sampling requests from problems: rendered prompts and derived seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ogls.config import ModelConfig
from ogls.problems.prompts import Prompter
from ogls.records import Problem, Request
from ogls.seeds import derive_seed


def build_requests(
    problems: Sequence[Problem], prompter: Prompter, samples: int, run_seed: int, *purpose: Any
) -> list[Request]:
    """`samples` requests for each problem, in order; each seed derives from (run seed, purpose, problem, sample)."""
    requests = []
    for problem in problems:
        ids = tuple(prompter.student(problem.problem))
        for sample in range(samples):
            seed = derive_seed(run_seed, *purpose, problem.problem_id, sample)
            requests.append(Request(problem.problem_id, sample, ids, seed))
    return requests


def check_context(model: ModelConfig, context: int, prompt_tokens: int, max_tokens: int) -> str:
    """Why a prompt and its completion do not fit the context of the model; an empty string if they fit."""
    needed = prompt_tokens + max_tokens
    if needed <= context:
        return ""
    return f"{prompt_tokens} tokens and a completion of up to {max_tokens}; {model.path} takes {context}"
