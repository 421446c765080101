"""Attacks: what tries to bring an erased concept back, one attack a file.

`protocol.Attack` is the base of every attack; `registry.ATTACKS` finds them by name.
"""
