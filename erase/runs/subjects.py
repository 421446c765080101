"""The concepts of a run, in the model's language, and how they are announced."""

from collections.abc import Sequence

from erase import concepts
from erase.concepts import Concept
from erase.errors import EraseError
from erase.families.protocol import Family
from erase.methods import Method
from erase.mini import vocabulary, world
from erase.options import model_classes
from erase.options.recipes import prompts_of
from erase.options.settings import Settings


def announcement(concept: Concept, settings: Settings, method: Method) -> str:
    """The line for the user about forget prompt and anchor, before the work begins."""
    forget, more = concept.forget[0], len(concept.forget) - 1
    rest = f" (and {more} more prompt{'s' if more > 1 else ''})" if more else ""
    if not method.anchors:
        return f"{concept.name}: {forget!r}{rest} is unlearned; {settings.method} uses no anchor"
    if settings.target == "random" and concept.others:
        return f"{concept.name}: {forget!r}{rest} -> a random one of {len(concept.others)} other classes"
    if settings.target == "fixed" and concept.others:
        return f"{concept.name}: {forget!r}{rest} -> {concept.others[0]!r}"
    hints = [concepts.advice(concept), "--anchor chooses another" if settings.kind and not settings.anchor else ""]
    return "; ".join([f"{concept.name}: {concepts.mapping(concept)}", *filter(None, hints)])


def find_concepts(settings: Settings, given: Sequence[Concept | None], model: Family | None) -> list[Concept]:
    """The concepts that the settings name or that are given, in the model's language (None: any), with overrides."""
    return [find_concept(settings, name, one, model) for name, one in zip(settings.concept, given, strict=True)]


def find_concept(settings: Settings, name: str, concept: Concept | None, model: Family | None) -> Concept:
    """One of them."""
    given = {"forget": settings.forget, "anchor": settings.anchor, "retain": settings.retain}
    is_mini = model.is_mini if model else vocabulary.is_embedded(settings.model)
    if concept is None and not settings.kind:
        concept = model_classes.class_concept(name, str(settings.base or settings.model), settings.config)
    if concept is None:
        if is_mini and not (settings.kind and settings.forget and settings.anchor):
            vocabulary.require_preset(name)
        concept = concepts.find(name, settings.kind, model_family="mini" if is_mini else None)
        if prompts_of(settings) == "code" and not name.lower().endswith(".toml"):  # a file's prompts are the user's
            concept = concepts.in_prompts_of_the_code(concept)
    concept = concepts.override(concept, **{key: value or None for key, value in given.items()})
    if settings.erase_from is not None:
        concept = concepts.erased_from(concept, settings.erase_from, free_text=not is_mini)
    if is_mini:
        require_known(concept, settings)
    if model and not model.is_mini and concept.judge.get("type") == "mini" and not settings.forget:
        raise EraseError(
            f"the preset {concept.name!r} is of the embedded model's world; "
            f'for {settings.model} describe it: --concept "{concept.name}" --kind {concept.kind}'
        )
    return concept


def require_known(concept: Concept, settings: Settings) -> None:
    """Raise an EraseError for a prompt with a word that the embedded model was never shown.

    Retain prompts are those that the user gives: a concept's own do no harm.
    """
    for part, prompts in (("forget", concept.forget), ("anchor", concept.anchor), ("retain", settings.retain)):
        for prompt in prompts:
            if strange := vocabulary.unknown_words(prompt):
                other = "; give --anchor, such as 'a photo of a square'" if part == "anchor" else ""
                raise EraseError(
                    f"the embedded model does not know {strange[0]!r} (in the {part} prompt {prompt!r}){other}; "
                    f"it knows {', '.join(world.SHAPES)} and persons"
                )
