"""Tasks: which images to generate for a concept, and which figures to compute from the judges' outputs, one per file.

`protocol.Task` is the base of every task; `registry.build` makes the samples of one by its name.
"""
