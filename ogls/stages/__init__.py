"""The stages of a run, one file per stage; each reads its inputs, computes and writes its tables.

Belongs here: code that connects the store with the algorithm, for the work of a round.
Does not belong here: arithmetic (the packages that this one imports), retries and artifacts (`tasks/`).
"""
