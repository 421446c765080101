"""Tasks: what to generate for a concept and which figures its judges' scores give, one task a file.

`protocol.Task` is the base of every task; `registry.build` makes the samples of one by its name.
"""
