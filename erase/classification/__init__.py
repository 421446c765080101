"""Unlearning for image classifiers, on the same mask engine: data, networks, methods and one function that runs them."""
