"""What evaluation completions amount to: avg@k, pass@k, intervals; and whether a run is healthy.

Belongs here: measures and decisions computed from rows.
Does not belong here: sampling and judging the completions (`stages/evaluate.py`).
"""
