"""Any style, which CLIP distinguishes from its alternatives."""

from erase.evaluation.tasks.object import Object


class Style(Object):
    """As for an object: the target and its alternatives, which CLIP distinguishes."""

    about = "any style; CLIP distinguishes it from its alternatives"
