"""Interop: models of other programs (``foreign.py``) and of ours in other libraries' forms (``export.py``).

A module for each library, ``clip.py`` between them and our towers, ``files.py`` for what is read of any file.
Of the project it imports what stands before it, models above all; never the engine or build.
"""
