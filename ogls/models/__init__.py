"""The model: loading, body, head, and the trained adapter. The only imports of peft.

Belongs here: what touches weights, and the numbers that describe a model.
Does not belong here: prompts (`problems`), and how tokens are sampled (`samplers`).
"""
