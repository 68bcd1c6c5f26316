"""Query a run and plot its curve: open with `marimo edit docs/notebooks/curve.py`, or run it as a script.

OGLS_STORE and OGLS_RUN are the store and the name of the run. Default: run `tiny` of the quickstart in `data/runs`.
"""

import marimo

app = marimo.App()


@app.cell
def _():
    import os

    import marimo as mo

    from ogls.store import Store, named_queries, run_query

    store = Store(os.environ.get("OGLS_STORE", "data/runs"))
    run = os.environ.get("OGLS_RUN", "tiny")
    mo.md(f"# {run}\n\nEvery table of the store is a view in DuckDB; queries return Arrow tables.")
    return mo, named_queries, run, run_query, store


@app.cell
def _(named_queries, run, run_query, store):
    import polars

    curve = polars.from_arrow(run_query(store, named_queries()["rounds"], run))
    curve  # noqa: B018
    return (curve,)


@app.cell
def _(run, run_query, store):
    # The tokens after which the target changes the sampled token most: the digit after the equals sign, not the words.
    changes = run_query(
        store,
        """
        SELECT lag(token) OVER (PARTITION BY round, problem_id, sample ORDER BY position) AS token_before,
               abs(token_target_logprob - token_base_logprob) AS change
        FROM targets
        """,
        run,
    ).to_pandas()
    moved = changes.groupby("token_before")["change"].agg(["mean", "count"]).sort_values("mean", ascending=False)
    moved[moved["count"] >= 20].head(10)
    return (moved,)


@app.cell
def _(curve, mo, run):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    accuracy = figure.subplots()
    evaluated = curve.drop_nulls("accuracy")
    accuracy.fill_between(
        evaluated["round"], evaluated["accuracy_low"], evaluated["accuracy_high"], color="#0072B2", alpha=0.2
    )
    accuracy.plot(evaluated["round"], evaluated["accuracy"], "o-", color="#0072B2", label="sampled, 95% interval")
    accuracy.plot(evaluated["round"], evaluated["greedy_accuracy"], "s--", color="#D55E00", label="greedy")
    accuracy.set_xlabel("round")
    accuracy.set_ylabel("accuracy")
    accuracy.set_title(run)
    accuracy.legend()
    mo.as_html(figure)
    return (figure,)


if __name__ == "__main__":
    app.run()
