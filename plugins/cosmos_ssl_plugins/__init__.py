"""The built-in parts, on the public surface alone."""
