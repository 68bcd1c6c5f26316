"""The method of the paper: the contexts of the teacher, the teacher pass, steering, and measurements of targets.

Belongs here: everything between verified rollouts and targets, as tensors.
Does not belong here: the store, and the training loop (`training`).
"""
