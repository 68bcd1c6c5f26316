r"""Word problems for a real model: a few steps of arithmetic about things that somebody has, with their solutions.

    python -m ogls.tinyworld.word_problems FOLDER

writes warm.jsonl (to learn the form from), train.jsonl and test.jsonl; no text is in two of them. A small instruction
model that solves none of them solves about half after a warm-up by SFT, so its groups are mixed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

NAMES = ("Ada", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo")
THINGS = ("apples", "marbles", "stickers", "books", "pencils", "coins", "cards", "shells", "stamps", "cookies")
SENTENCES = {
    "+": ("{name} buys {n} more {things}.", "{name} finds {n} {things}.", "A friend gives {name} {n} {things}."),
    "-": ("{name} gives {n} {things} to a friend.", "{name} loses {n} {things}.", "{name} sells {n} {things}."),
    "*": ("After a year, {name} has {n} times as many {things}.", "The number of {things} grows to {n} times as many."),
}
SIZES = {"warm": 400, "train": 400, "test": 200}


def word_problem(rng: np.random.Generator, steps: tuple[int, int] = (1, 2)) -> dict[str, str]:
    """A random problem of `steps` (fewest, most) steps: text, solution (a line per step, boxed answer), and answer."""
    name, things = str(rng.choice(NAMES)), str(rng.choice(THINGS))
    value = int(rng.integers(5, 60))
    told, lines = [f"{name} has {value} {things}."], []
    for _ in range(rng.integers(steps[0], steps[1] + 1)):
        operation = str(rng.choice(["+", "-", "*"] if value <= 60 else ["+", "-"]))
        n = {"+": rng.integers(5, 60), "-": rng.integers(2, value), "*": rng.integers(2, 5)}[operation]
        result = {"+": value + n, "-": value - n, "*": value * n}[operation]
        told.append(str(rng.choice(SENTENCES[operation])).format(name=name, n=n, things=things))
        lines.append(f"{value} {operation} {n} = {result}")
        value = int(result)
        if value < 3:  # too few to take any away
            break
    told.append(f"How many {things} does {name} have now?")
    answer = str(int(result))
    return {"problem": " ".join(told), "solution": "\n".join([*lines, rf"\boxed{{{answer}}}"]), "answer": answer}


def write_word_problems(folder: Path, seed: int = 0) -> None:
    """Write the three files. Raises FileExistsError if the folder exists."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, 0])
    seen: set[str] = set()
    for name, count in SIZES.items():
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            row = word_problem(rng)
            if row["problem"] not in seen:
                seen.add(row["problem"])
                rows.append(row)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_word_problems(Path(sys.argv[1]))
