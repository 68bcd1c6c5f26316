"""The record store: shards, manifests, locks, and SQL over all of it. The only package that spells a path.

Belongs here: how records get to a disk or an object store, and how they are read and queried.
Does not belong here: what the records mean; the algorithm does not import this package.
"""

from ogls.store.query import export_database, named_queries, run_query
from ogls.store.run_store import RunStore
from ogls.store.store import Store

__all__ = ["RunStore", "Store", "export_database", "named_queries", "run_query"]
