"""An attribute that is taken from one concept only: "glasses" from "scientist", "striped" from "circle"."""

from dataclasses import replace

from erase.concepts import refusal
from erase.concepts.concept import Concept
from erase.errors import EraseError
from erase.words import article

# prompts of the host with the attribute, and without it
_WITH = (
    ("a photo of {host} with {name}", "a photo of {host}"),
    ("a close-up photo of {host} with {name}", "a close-up photo of {host}"),
    ("{host} with {name} on a street", "{host} on a street"),
    ("a drawing of {host} with {name}", "a drawing of {host}"),
)
_IN_STYLE = (
    ("a picture of {host} in the style of {name}", "a picture of {host}"),
    ("a portrait of {host} in the style of {name}", "a portrait of {host}"),
    ("{host} in the style of {name}", "{host}"),
)


def erased_from(concept: Concept, host: str, *, free_text: bool = True) -> Concept:
    """The concept as an attribute of `host` alone: it is forgotten where the host has it, and retained elsewhere.

    Forget prompts are those of the concept that say the host's words, with their anchors; if there is none, they are
    made from both, and the anchor is the host without the attribute. The concept's other forget prompts and all anchors
    become retain prompts.

    host: such as "scientist". free_text: whether the model knows prompts that are made from both.

    Raises:
        EraseError: no words, the concept itself, no prompt that says both where none can be made, or see `Concept`.
    """
    host = " ".join(host.split())
    if not refusal.plain(host).split():
        raise EraseError(f"--erase-from is {host!r}; give a concept, such as 'scientist'")
    if refusal.plain(host).split() == refusal.plain(concept.name).split():
        raise EraseError(
            f"--erase-from names the concept {concept.name!r} itself; name what has it, or leave the option out"
        )
    inside = [pair for pair in concept.pairs() if _says(pair[0], host)]
    if not inside and not free_text:
        raise EraseError(
            f"--erase-from is {host!r}, but no forget prompt of {concept.name!r} says it, and the model "
            f"knows no others; name a word of these prompts, such as one of {concept.forget[0]!r}"
        )
    elsewhere = [forget for forget, _ in concept.pairs() if not _says(forget, host)]
    if not inside:
        templates = _IN_STYLE if concept.kind == "style" else _WITH
        words = {"host": f"{article(host)} {host}", "name": concept.name}
        inside = [(forget.format(**words), anchor.format(**words)) for forget, anchor in templates]
    forget, anchor = zip(*inside, strict=True)
    retain = dict.fromkeys((*elsewhere, *anchor, *concept.retain))
    return replace(
        concept,
        name=f"{concept.name} from {host}",
        forget=forget,
        anchor=anchor,
        retain=tuple(prompt for prompt in retain if prompt.strip() and prompt not in forget),
    )


def _says(prompt: str, host: str) -> bool:
    """Whether the prompt has all words of the host."""
    return set(refusal.plain(host).split()) <= set(refusal.plain(prompt).split())
