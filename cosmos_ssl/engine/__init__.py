"""What trains: a step (``step`` and its stages), the run around it (``trainer``), and what a run leaves in its folder.

It knows parts by the contract alone, and no method by name. May import everything that stands before it: the contract,
config, data, models, evaluation; not ``build``, which makes what it works on.
"""
