"""Attacks, which try to bring an erased concept back, one attack per file.

`protocol.Attack` is the base of every attack; `registry.ATTACKS` finds them by name.
"""
