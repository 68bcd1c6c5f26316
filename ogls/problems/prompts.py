"""All prompts, of the student and of the teacher: from text to rendered text and token ids.

The student sees the problem. The teacher sees the problem and one exemplar. Correct and failed rollouts use the same
template, so that its effect on style cancels in the difference (arXiv 2605.12400).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ogls.config import PromptsConfig

_PLACEHOLDER = re.compile(r"\{(problem|exemplar|feedback)\}")


class Prompter:
    """Renders and tokenizes prompts with one tokenizer and one thinking flag, the same in every stage."""

    def __init__(self, tokenizer: Any, prompts: PromptsConfig, thinking: bool = False):
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.thinking = thinking
        self.control_tokens = sorted({t for t in tokenizer.get_added_vocab() if len(t) > 1}, key=len, reverse=True)

    def student(self, problem: str) -> list[int]:
        """Token ids of the student's prompt, including the generation prompt."""
        return self.fill(self.prompts.student, problem=problem)

    def teacher(self, problem: str, exemplar: str, *, reference: bool = False) -> list[int]:
        """Token ids of the teacher's prompt with one exemplar, including the generation prompt."""
        template = self.prompts.reference if reference else self.prompts.exemplar
        return self.fill(template, problem=problem, exemplar=exemplar)

    def fill(self, template: str, **values: str) -> list[int]:
        """Token ids of a user message from a template, including the generation prompt."""
        return self._ids(fill_template(template, **{name: self._escape(value) for name, value in values.items()}))

    def render(self, user: str) -> str:
        """The chat template around one user message, including the generation prompt."""
        messages = [{"role": "user", "content": user}]
        if self.prompts.system:
            messages.insert(0, {"role": "system", "content": self.prompts.system})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking
        )

    def _escape(self, text: str) -> str:
        return escape_control_tokens(text, self.control_tokens)

    def _ids(self, user: str) -> list[int]:
        return self.tokenizer(self.render(user), add_special_tokens=False)["input_ids"]


def escape_control_tokens(text: str, control_tokens: Iterable[str]) -> str:
    """Split control tokens in the text by a space, so that a problem or rollout cannot imitate a chat turn.

    `control_tokens` are the longest first.
    """
    for token in control_tokens:
        text = text.replace(token, token[0] + " " + token[1:])
    return text


def fill_template(template: str, **values: str) -> str:
    """Replace `{problem}`, `{exemplar}` and `{feedback}` in one pass; braces inside the values stay unchanged."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)
