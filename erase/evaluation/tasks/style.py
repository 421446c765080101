"""Any style, told from its alternatives by CLIP."""

from erase.evaluation.tasks.object import Object


class Style(Object):
    """As for an object: the target and its alternatives, told apart by CLIP."""

    about = "any style, told from its alternatives by CLIP"
