"""From what the user names to a model with all that is applied to it, and the concept that it is about."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase import concepts, guards, words
from erase.concepts import Concept
from erase.errors import EraseError
from erase.evaluation import generate
from erase.evaluation.options import Drawing, Options
from erase.evaluation.tasks import registry as tasks
from erase.evaluation.tasks.protocol import SampleSet
from erase.families.protocol import Family
from erase.mini import vocabulary
from erase.options import model_classes
from erase.runs import record
from erase.runs.record import DELTA, Models, RunRecord


@dataclass(frozen=True)
class Source:
    """A model and what is applied to it: all that decides which weights generate."""

    model: str
    unet: str | None = None
    delta: str | None = None
    config: str | None = None
    revision: str | None = None
    guard: Any = None

    def load(self, drawing: Drawing, *, only_generates: bool = False) -> Family:
        """See `generate.load_model`."""
        return generate.load_model(
            self.model,
            delta_path=self.delta,
            device=drawing.device,
            precision=drawing.precision,
            guard=self.guard,
            only_generates=only_generates,
            allow_pickle=drawing.allow_pickle,
            config=self.config,
            revision=self.revision,
            cache_dir=Path(drawing.cache_dir) if drawing.cache_dir else None,
            unet=self.unet,
        )


def run_record(model: str) -> RunRecord | None:
    """The record of a finished run's folder; None for any other model."""
    path = Path(model) / "run.json"
    found = record.read(path) if path.is_file() else None
    return found if isinstance(found, RunRecord) else None


def erased_concepts(model: str) -> list[Concept]:
    """The concepts that a run folder says were erased."""
    found = run_record(model)
    return list(found.concepts) if found else []


def concept_of(name: str | None, kind: Any, model: str, config: str | None = None) -> Concept | None:
    """The concept of this name, else the one that the run folder says was erased. config: `Drawing.config`."""
    made, erased = run_record(model), erased_concepts(model)
    if name:
        known = [part for part in erased if part.name.lower() == name.lower().replace("_", " ")]
        if known:
            return known[0]
        is_mini = vocabulary.is_embedded(model) or bool(made and "mini" in {made.model.name, made.model.origin})
        if is_mini:
            vocabulary.require_name(name)
        of_class = None if kind else model_classes.class_concept(name, model, config)
        return of_class or concepts.find(name, kind, model_family="mini" if is_mini else None)
    if len(erased) > 1:
        raise EraseError(f"{model} erased {', '.join(part.name for part in erased)}; choose one with --concept")
    return erased[0] if erased else None


def make_guard(drawing: Drawing, concept: Concept | None) -> Any:
    """The guard that is asked for, against the text that is given or else the concept's name and synonyms."""
    if drawing.guard is None:
        return None
    text = drawing.guard_text or (", ".join([concept.name, *concept.synonyms]) if concept else "")
    if not text:
        raise EraseError("a guard needs a concept or a text to steer away from; give --concept or --guard-text")
    guard, scale = guards.make(drawing.guard, text), drawing.guidance_scale
    if guard.needs_guidance and scale is not None and scale <= 1:
        raise EraseError(f"a guard needs guidance above 1, and --guidance-scale is {scale}; --guard nag needs none")
    return guard


def make_task(name: str, options: Options, concept: Concept | None, model: str) -> SampleSet:
    """The task for this concept, in which nothing else that the model erased is asked to stay."""
    others = [one for one in erased_concepts(model) if concept and one.name != concept.name]
    return tasks.build(name, concept, options, others)


def source_of(model: str, drawing: Drawing, guard: Any) -> Source:
    """The model with all that is applied to it; a run that kept its delta only is its base with the delta."""
    made = run_record(model)
    if made and not (drawing.delta or drawing.unet) and not (Path(model) / "model_index.json").is_file():
        config = drawing.config or made.settings.get("config")
        return Source(made.model.name, None, str(Path(model) / DELTA), config, drawing.revision, guard)
    return Source(model, drawing.unet, drawing.delta, drawing.config, drawing.revision, guard)


@dataclass(frozen=True)
class Compared:
    """The models of one report by role, "base" first and "erased" last, and what they are called together.

    made_from: what run.json says of the weights. is_checked: they must be those that it states.
    """

    label: str
    sources: dict[str, Source]
    made_from: Models | None
    is_checked: bool


def compared(
    model: str, drawing: Drawing, guard: Any, *, concept: str | None, base: str | None, gold: str | None
) -> Compared:
    """The erased model beside its base, which run.json names where the user does not.

    concept: the name that the user gave. gold: a model that was trained without the concept.

    Raises:
        EraseError: neither the user nor run.json names a base.
    """
    record = run_record(model)
    made_from = record and record.model
    is_changed = bool(drawing.delta or drawing.unet or guard)
    named = made_from and made_from.origin
    origin = base or named or (model if is_changed else None)
    if not origin:
        raise EraseError(f"{model} has no run.json that names its base; give --base MODEL")
    config = drawing.config
    if not base and record:  # what the run read its single file with
        config = config or record.settings.get("config")
    label = label_of(model)
    if drawing.delta:
        label = label_of(Path(drawing.delta).resolve().parent.name)
    if drawing.unet:
        label = label_of(Path(drawing.unet).stem)
    label += f"-{drawing.guard}" if guard else ""
    label += f"-{label_of(concept or '')}" if len(erased_concepts(model)) > 1 else ""
    sources = {"base": Source(str(origin), config=config, revision=drawing.revision)}
    if gold:
        sources["gold"] = Source(gold, config=drawing.config, revision=drawing.revision)
    sources["erased"] = source_of(model, drawing, guard)
    return Compared(label, sources, made_from, not (drawing.delta or drawing.unet or base))


def check_origin(models: Compared, hashes: Mapping[str, str]) -> None:
    """The weights are those that run.json says: with a mixed-up base any figure would look real.

    hashes: of the trained networks, by role.

    Raises:
        EraseError: they are not.
    """
    if not models.is_checked or models.made_from is None:
        return
    for role, wanted in (("base", models.made_from.origin_hash), ("erased", models.made_from.result_hash)):
        if wanted != hashes[role]:
            raise EraseError(
                f"{models.sources['erased'].model}/run.json says that the {role} model's network is {wanted[:12]}, but "
                f"that of {models.sources[role].model} is {hashes[role][:12]}; give the right --base, or erase again"
            )


def label_of(model: str) -> str:
    """A file name for a model or a folder."""
    return words.slug(Path(model).resolve().name if os.path.exists(model) else model)
