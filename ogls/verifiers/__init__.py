"""Judging completions in guarded worker processes. The only imports of math_verify.

Belongs here: finding an answer in a text, and judging it.
Does not belong here: what a verdict means for training (`stages/verify.py`).
"""
