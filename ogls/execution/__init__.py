"""Where the shards of a stage are carried out: in this process (`local`), or by workers on a Ray cluster (`ray_pool`).

Here belongs what places work, and survives workers and nodes that die. What is computed for a shard belongs to the
stages: this package calls it through the protocol in `work` and knows no stage. ray is imported only by the modules
whose names begin with `ray_`, inside functions: it is an extra.
"""
