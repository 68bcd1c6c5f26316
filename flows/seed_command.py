"""The command `ogls seed-model`: a model and problems of the tiny world, with other styles, facts or lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import DEVELOP, err, out
from ogls.errors import UserError


def register(app: Any) -> None:
    """Add the command to the command line."""
    app.command("seed-model", rich_help_panel=DEVELOP, no_args_is_help=True)(seed_model)


def _share(about: str) -> Any:
    return typer.Option(help=about, min=0, max=1, metavar="SHARE")


def seed_model(
    out_dir: Annotated[Path, typer.Argument(help="New folder for the model and the problems.")],
    terse: Annotated[float, _share("Terse answers (0 to 1) in texts that show a solution first.")] = 0.5,
    reflection: Annotated[float, _share("Comments on the text that was read, in those that are not terse.")] = 0.0,
    foreign: Annotated[float, _share("Solutions by another route, in texts and in the problems' files.")] = 0.0,
    length: Annotated[
        tuple[int, int], typer.Option(help="Fewest and most steps of a problem.", metavar="FEWEST MOST")
    ] = (3, 6),
    errors: Annotated[
        float, typer.Option(help="Multiplies the error rates of the facts; longer problems need fewer.", min=0, max=1.6)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the pretraining text.", min=0)] = 0,
    facts: Annotated[int, typer.Option(help="Seed of the facts that the model is unsure of.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Number of pretraining steps.", min=1)] = 1500,
) -> None:
    """Pretrain the seed model of the tiny world. Takes some minutes on a CPU."""
    from rich.progress import Progress

    from ogls.tinyworld.seedmodel import SeedRecipe, make_seed_model
    from ogls.tinyworld.world import World

    if not 1 <= length[0] <= length[1]:
        raise UserError(f"--length {length[0]} {length[1]}: give the fewest steps (at least 1), then the most")
    rates = tuple(errors * rate for rate in World.error_rates)
    world = World(facts, rates, World.error_shares, World.context_share, terse, reflection, foreign, length)
    words = 64 if reflection or foreign else 0  # tokens for the words of comments and of the other route
    recipe = SeedRecipe(world, vocabulary=SeedRecipe.vocabulary + words, seed=seed, steps=steps)
    with Progress(console=err) as bar:
        job = bar.add_task("pretraining", total=steps)
        try:
            loss = make_seed_model(out_dir, recipe, lambda done, _: bar.update(job, completed=done))
        except FileExistsError as error:
            raise UserError(str(error)) from None
    out.print(f"final loss {loss:.3f} nats per token; model, train.jsonl and test.jsonl are in {out_dir}")
