"""The embedded default: problems of arithmetic modulo ten, and the seed model that is unsure of its facts.

Belongs here: the recipe of what is shipped in `data/tiny`.
Does not belong here: anything that a run on another model would need.
"""
