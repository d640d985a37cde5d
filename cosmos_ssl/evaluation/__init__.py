"""Evaluation: retrieval, classification, nearest neighbours, attention maps, pictures."""
