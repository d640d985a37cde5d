"""Models: attention and packing, transformer, the model of towers, heads and losses, and the plan of what it computes.

``contract`` holds what parts return to what they promise. May import the contract (``api``), ``functional`` and what
stands before them.
"""
