"""Metrics of evaluation completions (avg@k, pass@k, confidence intervals), and health checks of a run.

Belongs here: measures and decisions computed from rows.
Does not belong here: sampling and verifying the completions (`stages/evaluate.py`).
"""
