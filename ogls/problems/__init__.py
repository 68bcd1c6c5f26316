"""Problems: reading and cleaning them, splitting them, and rendering every prompt.

Belongs here: data sources, splits, and all text that is put before a model.
Does not belong here: judging an answer (`verifiers`).
"""
