"""Models: attention and packing, transformer, the model of towers, heads and losses."""
