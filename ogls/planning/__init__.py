"""Estimates of what a configuration needs before it runs: memory, tokens, time and disk space per stage.

Belongs here: estimates, and the specifications of the machines that they are made for.
Does not belong here: measurements of an existing run (`analysis`).
"""
