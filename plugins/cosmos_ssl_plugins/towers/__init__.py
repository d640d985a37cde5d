"""Built-in towers."""
