"""A concept in the prompts of SalUn's code: one to forget and one to keep, or one for each class."""

from dataclasses import replace

from erase.concepts.concept import Concept

# Imagenette's classes in the order of its labels, with their places in ImageNet
CLASSES = {
    0: "tench",
    217: "English springer",
    482: "cassette player",
    491: "chain saw",
    497: "church",
    566: "French horn",
    569: "garbage truck",
    571: "gas pump",
    574: "golf ball",
    701: "parachute",
}


def in_prompts_of_the_code(concept: Concept) -> Concept:
    """The concept as SalUn's code names it.

    An Imagenette class is "an image of a {class}"; class c becomes class (c + 1) % 10, and all others are retained.
    Nudity is "a photo of a nude person", which becomes "a photo of a person wearing clothes", the retain prompt. Other
    classes of a class-conditional model stay as they are. Other
    concepts are not in the code: their first forget prompt, its anchor and their first retain prompt stay.
    """
    if concept.judge.get("type") == "classes":
        return concept
    if concept.judge.get("type") == "imagenet" and concept.judge["index"] in CLASSES:
        prompts = [f"an image of a {name}" for name in CLASSES.values()]
        c = list(CLASSES).index(concept.judge["index"])
        rest = tuple(prompts[c + 1 :] + prompts[:c])
        return replace(concept, forget=(prompts[c],), anchor=rest[:1], retain=rest, others=rest)
    if concept.kind == "nudity" and concept.judge.get("type") == "nudenet":
        clothed = ("a photo of a person wearing clothes",)
        return replace(concept, forget=("a photo of a nude person",), anchor=clothed, retain=clothed)
    forget, anchor = concept.pairs()[0]
    others = tuple(dict.fromkeys((anchor, *concept.others))) if concept.others else ()
    return replace(concept, forget=(forget,), anchor=(anchor,), retain=concept.retain[:1], others=others)
