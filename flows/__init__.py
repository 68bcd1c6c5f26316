"""Prefect flows (training, continual training, evaluation, studies) and the command line."""
