"""The model: loading it, its body and head, and the adapter that is trained. The only imports of peft.

Belongs here: what touches weights, and the numbers that describe a model.
Does not belong here: what a model is asked (`problems`), and how tokens are sampled (`samplers`).
"""
