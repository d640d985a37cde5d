"""Work on shards beside training: check, fix, split, merge, stats, and ``prepare``, which makes them of caption tables.

What they share: ``output``, a folder of shards in the making, and ``keys``, by which equal things are found.
Imports data and what stands before it; training never imports it (``cosmos_ssl.cli`` does).
"""
