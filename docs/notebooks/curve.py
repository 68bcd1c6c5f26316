"""From a run to a figure: open with `marimo edit docs/notebooks/curve.py`, or run it as it is.

OGLS_STORE and OGLS_RUN name the store and the run; the quickstart's by default.
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
    mo.md(f"# {run}\n\nEvery table of the store is a view in DuckDB; answers come as Arrow.")
    return mo, named_queries, run, run_query, store


@app.cell
def _(named_queries, run, run_query, store):
    import polars

    curve = polars.from_arrow(run_query(store, named_queries()["rounds"], run))
    curve  # noqa: B018
    return (curve,)


@app.cell
def _(run, run_query, store):
    # Where the target moves the sampled token most: the digit after the equals sign, not the words.
    before = run_query(
        store,
        """
        SELECT lag(token) OVER (PARTITION BY round, problem_id, sample ORDER BY position) AS token_before,
               abs(token_target_logprob - token_base_logprob) AS moved
        FROM targets
        """,
        run,
    ).to_pandas()
    moved = before.groupby("token_before")["moved"].agg(["mean", "count"]).sort_values("mean", ascending=False)
    moved[moved["count"] >= 20].head(10)
    return (moved,)


@app.cell
def _(curve, mo, run):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    accuracy = figure.subplots()
    known = curve.drop_nulls("accuracy")
    accuracy.fill_between(known["round"], known["accuracy_low"], known["accuracy_high"], color="#0072B2", alpha=0.2)
    accuracy.plot(known["round"], known["accuracy"], "o-", color="#0072B2", label="sampled, 95% interval")
    accuracy.plot(known["round"], known["greedy_accuracy"], "s--", color="#D55E00", label="greedy")
    accuracy.set_xlabel("round")
    accuracy.set_ylabel("accuracy")
    accuracy.set_title(run)
    accuracy.legend()
    mo.as_html(figure)
    return (figure,)


if __name__ == "__main__":
    app.run()
