"""What a configuration will need: memory, tokens, time and disk by stage, before anything runs.

Belongs here: estimates, and the machines that they are made for.
Does not belong here: measuring a run that exists (`analysis`).
"""
