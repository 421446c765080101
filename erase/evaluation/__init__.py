"""Measuring: what a model still draws, what it lost, and how sure that is. Nothing else in erase imports this."""
