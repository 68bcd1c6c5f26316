"""Each stage as read, compute, write: one file a stage, and the frame that all of them run in.

Belongs here: where the store meets the algorithm, for the work of a round.
Does not belong here: arithmetic (the packages below), retries and artifacts (`tasks/`).
"""
