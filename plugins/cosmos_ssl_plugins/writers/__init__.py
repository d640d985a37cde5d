"""Built-in writers: files of the run's folder, and the programs that follow experiments.

The latter are libraries of their own, imported when a run starts; the check says how to install one that is missing.
"""
