r"""Finding the answer in a completion: `\boxed{...}`, GSM8K's `####`, or the text itself."""

from __future__ import annotations

import re

_HASHES = re.compile(r"####\s*([^\n]+)")


def find_answer(text: str, require_boxed: bool = True) -> str | None:
    r"""The last whole \boxed{...}, else what follows the last ####, else (if allowed) the text itself."""
    end = len(text)
    while (start := text.rfind(r"\boxed{", 0, end)) >= 0:
        if (content := _braced(text, start + len(r"\boxed"))) is not None:
            return content.strip() or None
        end = start
    if hashes := _HASHES.findall(text):
        return hashes[-1].strip() or None
    return None if require_boxed else text.strip() or None


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and its partner; None without one."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1 : place] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start + 1 : place]
    return None
