"""Sampling engines behind one protocol, one file an engine.

Belongs here: turning requests into completions, choosing an engine, and proving which weights an engine has.
Does not belong here: prompts (`problems`), and writing trajectories (`stages/sample.py`).
"""
