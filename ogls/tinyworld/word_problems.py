r"""Word problems for a real model: a few steps of arithmetic about things that somebody has, with their solutions.

    python -m ogls.tinyworld.word_problems FOLDER [--told]

writes warm.jsonl (to learn the form from), train.jsonl and test.jsonl; no text is in two of them. A small instruction
model that solves none of them solves a third after a warm-up by SFT, so its groups are mixed. A solution is a line for
each step; with --told it is sentences in changing words, so that a model that has learned from them writes the same
steps in different words, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("Ada", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo")
THINGS = ("apples", "marbles", "stickers", "books", "pencils", "coins", "cards", "shells", "stamps", "cookies")
SENTENCES = {
    "+": ("{name} buys {n} more {things}.", "{name} finds {n} {things}.", "A friend gives {name} {n} {things}."),
    "-": ("{name} gives {n} {things} to a friend.", "{name} loses {n} {things}.", "{name} sells {n} {things}."),
    "*": ("After a year, {name} has {n} times as many {things}.", "The number of {things} grows to {n} times as many."),
}
OPENINGS = ("", "", "Let's see. ", "At first {name} has {value} {things}. ", "We go step by step. ")
TOLD = (
    "Then {name} has {value} {operation} {n} = {result} {things}.",
    "That makes {value} {operation} {n} = {result}.",
    "So there are {value} {operation} {n} = {result} {things}.",
    "We compute {value} {operation} {n} = {result}.",
    "After this, {name} is left with {value} {operation} {n} = {result}.",
)
CLOSINGS = (
    r"The answer is \boxed{{{answer}}}.",
    r"{name} now has \boxed{{{answer}}} {things}.",
    r"So it is \boxed{{{answer}}}.",
)
SIZES = {"warm": 400, "train": 400, "test": 200}


def word_problem(rng: np.random.Generator, steps: tuple[int, int] = (1, 2), in_words: bool = False) -> dict[str, str]:
    """A random problem of `steps` (fewest, most) steps: text, solution and answer.

    The solution has a line per step and the boxed answer; `in_words`: a sentence for each, with random words.
    """
    name, things = str(rng.choice(NAMES)), str(rng.choice(THINGS))
    value = int(rng.integers(5, 60))
    told, steps_done = [f"{name} has {value} {things}."], []
    for _ in range(rng.integers(steps[0], steps[1] + 1)):
        operation = str(rng.choice(["+", "-", "*"] if value <= 60 else ["+", "-"]))
        n = {"+": rng.integers(5, 60), "-": rng.integers(2, value), "*": rng.integers(2, 5)}[operation]
        result = {"+": value + n, "-": value - n, "*": value * n}[operation]
        told.append(str(rng.choice(SENTENCES[operation])).format(name=name, n=n, things=things))
        steps_done.append({"value": value, "operation": operation, "n": n, "result": int(result)})
        value = int(result)
        if value < 3:  # too few to take any away
            break
    told.append(f"How many {things} does {name} have now?")
    answer = str(int(result))
    if in_words:
        solution = _tell(steps_done, rng, name=name, things=things, answer=answer)
    else:
        lines = ["{value} {operation} {n} = {result}".format(**step) for step in steps_done]
        solution = "\n".join([*lines, rf"\boxed{{{answer}}}"])
    return {"problem": " ".join(told), "solution": solution, "answer": answer}


def _tell(steps: list[dict[str, Any]], rng: np.random.Generator, **words: str) -> str:
    """The steps as sentences, each in one of several wordings."""
    opening = str(rng.choice(OPENINGS)).format(value=steps[0]["value"], **words)
    sentences = [str(rng.choice(TOLD)).format(**step, **words) for step in steps]
    return opening + " ".join([*sentences, str(rng.choice(CLOSINGS)).format(**words)])


def write_word_problems(folder: Path, seed: int = 0, in_words: bool = False) -> None:
    """Write the three files, with solutions `in_words` or as lines. Raises FileExistsError if the folder exists."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, 0])
    seen: set[str] = set()
    for name, count in SIZES.items():
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            row = word_problem(rng, in_words=in_words)
            if row["problem"] not in seen:
                seen.add(row["problem"])
                rows.append(row)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--told", action="store_true")
    given = parser.parse_args()
    write_word_problems(given.folder, in_words=given.told)
