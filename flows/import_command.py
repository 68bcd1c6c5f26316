"""The command `ogls import`: round 1 of a new run from completions that exist."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import CONFIG_HELP, DATA, Set, count_of, err, out
from flows.shipped import find_file
from ogls.errors import UserError


def register(app: Any) -> None:
    """Add the command to the command line."""
    app.command("import", rich_help_panel=DATA, no_args_is_help=True)(import_completions)


def _column(about: str, *names: str) -> Any:
    return typer.Option(*names, metavar="COLUMN", help=about)


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A .jsonl, .json, .csv or .parquet file, a folder of them, or the id of a Hugging Face dataset.",
    ),
]
ConfigOption = Annotated[Path, typer.Option(metavar="CONFIG", help=CONFIG_HELP, parser=partial(find_file, kind="runs"))]
Names = list[str] | None  # columns, one for each --completion
Problem = Annotated[str, _column("The problem: a text, or a chat.")]
Completion = Annotated[
    Names,
    _column(
        "The completion: a text, or a list of them. Repeatable. a.b is the field b of the column a; '*.b' stands for "
        "every column with a field b. Default: completion."
    ),
]
Messages = Annotated[
    str,
    _column(
        "A chat in OpenAI's form in place of --problem and --completion: its last user message is the problem, its "
        "last message the completion."
    ),
]
Answer = Annotated[str, _column("The expected answer; without it, that of the solution.")]
Solution = Annotated[str, _column("The reference solution.")]
Id = Annotated[str, _column("The id of the problem; without it, a hash of its text.", "--id")]
Correct = Annotated[
    Names,
    _column(
        "Whether the completion is correct: true or false, 1 or 0, or a word such as correct. Where it is empty, and "
        "without this option, the verifier of the run decides. Repeatable, as --completion."
    ),
]
FinishReason = Annotated[Names, _column("Why the completion ended: length if it was truncated. Repeatable.")]
TokenIds = Annotated[Names, _column("The token ids of the completion, of the tokenizer of the run. Repeatable.")]
Logprobs = Annotated[Names, _column("The log-probs (nats) of --token-ids where they were sampled. Repeatable.")]


def import_completions(
    source: Source,
    config: ConfigOption,
    run: Annotated[str, typer.Option(metavar="NAME", help="Name of the new run; default: that of CONFIG.")] = "",
    problem: Problem = "problem",
    completion: Completion = None,
    messages: Messages = "",
    answer: Answer = "answer",
    solution: Solution = "solution",
    id_: Id = "id",
    correct: Correct = None,
    finish_reason: FinishReason = None,
    token_ids: TokenIds = None,
    logprobs: Logprobs = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration name of a Hugging Face dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face dataset.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read only the first N rows.", min=1)] = None,
    set_: Set = None,
) -> None:
    """Make round 1 of a new run from completions that exist, in place of sampling it.

    Rows with the same problem form a group. Lines that cannot be used are counted and listed. The problems of SOURCE
    become the training problems of the run. `ogls stage`, `ogls train`, `ogls view` and the other commands then work on
    the round as on a sampled one; later rounds are sampled.

    Example: ogls import rollouts.jsonl --config mine.toml --run offline --completion text --correct ok
    """
    from ogls.config import Columns, DataSource, load_config
    from ogls.problems.completion_columns import CompletionColumns

    if messages and completion:
        raise UserError("give --messages or --completion: a chat has its completion as its last message")
    overrides = [*(set_ or []), *([f"name={run}"] if run else [])]
    columns = CompletionColumns(
        Columns(problem=problem, answer=answer, solution=solution, id=id_),
        tuple(completion or ["completion"]),
        tuple(correct or ()),
        tuple(finish_reason or ()),
        tuple(token_ids or ()),
        tuple(logprobs or ()),
        messages,
    )
    read_from = DataSource(source=source, split=split, subset=subset, revision=revision, limit=limit)
    loaded = load_config(config, overrides)
    _import(read_from, columns, loaded)
    _suggest(loaded, config, overrides)


def _suggest(loaded: Any, config: Path, overrides: list[str]) -> None:
    """Print what can be done with the round."""
    options = "".join(f" --set {shlex.quote(o)}" for o in overrides if not o.startswith("rounds="))
    file = shlex.quote(str(config))
    name, root = loaded.name, "" if loaded.root == "data/runs" else f" --root {shlex.quote(loaded.root)}"
    out.print("Next steps:")
    for purpose, command in (
        ("train on it, one round offline", f"ogls train {file}{options} --set rounds=1"),
        ("compare recipes on it, without training", f"ogls stage teach {file}{options} && ogls sweep {name}{root}"),
        ("read it", f"ogls view {name}{root}"),
    ):
        out.print(f"  {purpose}:\n    {command}", soft_wrap=True, highlight=False, markup=False)


def _import(source: Any, columns: Any, config: Any) -> None:
    """Read the completions, carry out the stages of the round, and print what they say."""
    from ogls.problems.completions import describe_bad_lines, read_completions
    from ogls.problems.load import Exclusions
    from ogls.stages.importing import import_round
    from tasks.progress import show_progress_on, terminal_progress

    report = Exclusions()
    rows = read_completions(source, columns, config.prompts, report, config.verify.answer_pattern, config.columns())
    if report.counts:
        _warn(f"{count_of(sum(report.counts.values()), 'bad line')} left out: {describe_bad_lines(report)}")
    show_progress_on(err)
    for result in import_round(config, rows, report, source.source, terminal_progress):
        state = "already done" if result.reused else "done"
        out.print(f"{result.stage} r{result.round:03d}: {count_of(result.rows, 'row')}, {state}", highlight=False)
        if result.notice:
            _warn(result.notice)
    groups, mixed = result.metrics["groups"], result.metrics["mixed_groups"]
    out.print(f"{config.name}: {count_of(groups, 'group')}, {mixed:,} with both outcomes", highlight=False)


def _warn(text: str) -> None:
    err.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
