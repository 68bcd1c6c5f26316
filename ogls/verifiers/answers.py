r"""Finding the answer in a completion: `\boxed{...}`, GSM8K's `####`, a pattern, or the text itself."""

from __future__ import annotations

import re

_HASHES = re.compile(r"####\s*([^\n]+)")


def find_answer(text: str, require_boxed: bool = True, pattern: str = "") -> str | None:
    r"""The content of the last complete \boxed{...}, else the text after the last ####, else the last match of the
    regular expression `pattern` (its group, if it has one); None if there is none.

    Without `require_boxed`, a text with none is the answer as a whole.
    """
    end = len(text)
    while (start := text.rfind(r"\boxed{", 0, end)) >= 0:
        if (content := _braced(text, start + len(r"\boxed"))) is not None:
            return content.strip() or None
        end = start
    if hashes := _HASHES.findall(text):
        return hashes[-1].strip() or None
    if matches := re.findall(pattern, text, re.MULTILINE) if pattern else []:
        return matches[-1].strip() or None
    return None if require_boxed else text.strip() or None


def _braced(text: str, start: int) -> str | None:
    """The text between the brace at `start` and its matching brace; None if there is no match."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "{}" and text[index - 1 : index] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return text[start + 1 : index]
    return None
