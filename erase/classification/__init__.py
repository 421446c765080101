"""Unlearning for image classifiers, on the same mask engine: data, networks, methods and the job that joins them."""
