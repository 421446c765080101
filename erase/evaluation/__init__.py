"""Measuring: whether a concept is gone and the rest is still there."""
