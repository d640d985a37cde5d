"""Evaluation of a trained model: the tasks of ``cosmos-ssl eval``, what a run's evaluators share with them, embeddings.

A task goes from ``tasks.py`` by a set of data (``*_sets.py``, ``pairs.py``, ``samples.py``) and the resumable store of
features (``features.py``) to the numbers of its protocol. Of the project it imports what stands before it: api,
functional, data and models; never interop, the engine or build.
"""
