"""Built-in optimisers."""
