"""The embedded default: noisy arithmetic, its tokenizer and its seed model (DESIGN section 6)."""
