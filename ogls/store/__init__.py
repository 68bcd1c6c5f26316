"""The record store: shards, manifests, locks and SQL. Only this package builds the paths of records.

Belongs here: writing records to a disk or an object store, reading and querying them.
Does not belong here: the meaning of the records. The algorithm does not import this package.
"""

from ogls.store.query import export_database, named_queries, run_query
from ogls.store.run_store import RunStore
from ogls.store.store import Store, existing_store

__all__ = ["RunStore", "Store", "existing_store", "export_database", "named_queries", "run_query"]
