"""Problems: reading and cleaning them, splitting them, and rendering every prompt.

Belongs here: data sources, splits, and prompts.
Does not belong here: judging an answer (`verifiers`).
"""
