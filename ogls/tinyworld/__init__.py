"""The tiny world: arithmetic problems modulo ten, and a seed model that knows the procedure but not all facts.

Belongs here: the code that generates the files in `data/tiny`.
Does not belong here: code that runs on other models need.
"""
