"""Unlearning for image classifiers, with the same masks as for diffusion models.

`run` has the whole run, and `train` and `unlearn` for any model in memory; `data` the data sets; `methods` the methods;
`descent` the training loop and saliency masks; `membership` the scores; `compare` the table of methods; `cli` the
command.
"""
