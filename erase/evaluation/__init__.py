"""Measuring: what a model still generates, what it lost, and how sure that is. Nothing else in erase imports this."""
