"""One training round: the items to train on, micro-batches, losses and the loop over optimizer steps.

Belongs here: everything between targets and updated weights, as tensors.
Does not belong here: where targets come from (`distillation`), and saving adapters (`stages/train.py`).
"""
