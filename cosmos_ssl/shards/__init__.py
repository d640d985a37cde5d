"""Work on shards: prepare, check, fix, split, merge, stats.

May import data and what stands before it; training never imports it.
"""
