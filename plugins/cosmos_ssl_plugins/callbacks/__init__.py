"""Built-in callbacks: what a run does beside its steps."""
