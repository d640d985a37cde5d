"""Models as programs that need nothing of this package: ONNX, and ``torch.export``.

``towers.py`` has the towers' plain mathematics, ``writing.py`` traces, writes and compares them, ``inputs.py`` writes
how texts and pictures become their inputs, ``example.py`` the lines that use them.
"""
