"""Rounds in readable loops: the paper's algorithm as Prefect flows, and the command line."""
