"""Evaluation: how often a model generates the concept, and what else changed. No other part of erase imports it."""
