"""Data: manifest, order, dataset reading, loader, captions, the procedural default set."""
