"""Sampling engines with one protocol, one module for each engine.

Belongs here: turning requests into completions, choosing an engine, and checking which weights an engine uses.
Does not belong here: prompts (`problems`), and writing trajectories (`stages/sample.py`).
"""
