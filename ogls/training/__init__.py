"""One training round: items to train on, losses, batches, and a plain loop over optimizer steps.

Belongs here: everything between targets and updated weights, as tensors.
Does not belong here: where targets come from (`distillation`), and saving adapters (`stages/train.py`).
"""
