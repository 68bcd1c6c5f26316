"""The idea of the paper: which contexts the teacher reads, the teacher pass, steering, and measures of both.

Belongs here: everything between verified rollouts and targets, as tensors.
Does not belong here: the store, and the training loop (`training`).
"""
