"""Attacks: what brings an erased concept back, one file each."""
