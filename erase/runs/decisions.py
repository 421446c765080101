"""The decisions of a run before its first image: settings, concepts, model, parameters, folder, device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn import Parameter

from erase import concepts, delta, device, files, masks, methods, processes, words
from erase.concepts import Concept
from erase.data import prompt_states
from erase.errors import EraseError, missing
from erase.families import loading
from erase.families.protocol import Family
from erase.options.effect import require_consistent
from erase.options.recipes import resolve
from erase.options.settings import SD_DEFAULTS, Settings
from erase.runs import folders, forms
from erase.runs.earlier import Base, read_base
from erase.runs.identity import of_run
from erase.runs.machine import make_accelerator
from erase.runs.mask_files import load_mask, saliency_hash
from erase.runs.planning import (
    can_scale,
    dtype_to_generate,
    make_method,
    moves_weights,
    needed_memory,
    require_divisible,
    require_effect,
    require_mask_attack,
    require_precision,
    require_rank,
    require_retain_rows,
    require_storage,
    require_two_gradients,
    require_watched,
)
from erase.runs.subjects import announcement, find_concepts
from erase.training import memory, null_space


@dataclass(frozen=True, eq=False)
class Decisions:
    """Everything that the phases of a run share; nothing in it changes but the weights of the model.

    settings: resolved, so that no value is left to a default. method: with its hyperparameters.
    concept: what is trained on: the union of `parts`, which this run erases, and of what `earlier` erased.
    parameters: those in the scope, by name. given_mask: the mask of a file; None if it is to be made or there is none.
    identity: what decides the weights. outputs: the files that the run will write.
    default: the resolved value of a setting when its option is not given.
    truncated: prompts that are longer than the text encoder reads.
    """

    settings: Settings
    method: methods.TrainedMethod | methods.ClosedForm
    concept: Concept
    parts: Sequence[Concept]
    earlier: Base | None
    model: Family
    parameters: Mapping[str, Parameter]
    given_mask: masks.Packed | None
    folder: Path
    cache_dir: Path
    identity: Mapping[str, Any]
    outputs: Sequence[str]
    default: Callable[[str], Any]
    truncated: Sequence[str]
    compute: device.Compute
    accelerator: Accelerator
    quiet: bool
    tell: Callable[[str], None]

    @property
    def all_concepts(self) -> list[Concept]:
        """The concepts that this run erases, then those that the run before it erased."""
        return [*self.parts, *(self.earlier.concepts if self.earlier else [])]

    @property
    def work(self) -> Path:
        """Folder of intermediate state."""
        return self.folder / "work"

    @property
    def base_hash(self) -> str:
        return self.identity["base_hash"]


def decide(
    settings: Settings, given: Sequence[Concept | None], *, quiet: bool, tell: Callable[[str], None]
) -> Decisions:
    """Check the settings, load the model, and fill in every default; nothing is written to the run folder.

    given: the concepts that the settings' names stand for; None where a name is a preset's or free text.

    Raises:
        EraseError: options that contradict each other, an unknown or refused concept, a model or mask that does not
            load.
    """
    method = _consistent_method(settings)
    found = find_concepts(settings, given, None)  # unknown or refused: an error before a model is loaded
    folder = Path(settings.output or Path("runs") / words.slug(" and ".join(one.name for one in found)))
    earlier = read_base(settings, folder)
    if earlier is not None:
        settings = replace(settings, model=str(settings.base))
    settings, compute = _with_precision(settings, method, tell)
    accelerator = make_accelerator(settings, folder, compute)
    cache_dir = Path(settings.cache_dir).expanduser() if settings.cache_dir else files.default_cache_dir()
    model = _load(settings, cache_dir, tell)
    model.precision = compute.precision
    parts = find_concepts(settings, given, model)
    everything = [*parts, *(earlier.concepts if earlier else [])]
    concept = concepts.unite(everything)
    given_settings = settings
    at_once = _at_once(settings, model, folder, compute, accelerator)
    settings, default = _filled(settings, concept, model, compute, accelerator.num_processes, at_once)
    require_rank(settings, method)
    require_storage(settings, method)
    method = make_method(settings)
    require_retain_rows(settings, method)
    model = _in_scope(model, settings, earlier)
    _require_able(model, settings, method)
    require_effect(given_settings, settings, method)
    require_mask_attack(settings, model)
    require_watched(settings, method)
    require_two_gradients(settings, method)
    truncated = prompt_states.truncated(model, concept)
    parameters = model.trainable(str(settings.scope))
    base_hash = delta.content_hash(model.state_of(model.network))
    given_mask = load_mask(settings, model, parameters, base_hash)
    if settings.null_space is not None:  # an error before the first image
        null_space.text_maps(model, parameters)
        text = prompt_states.read_text(model, concept)
        null_space.NullSpace(model, text, settings.null_space, parameters, given_mask)
    of_lora = given_mask if "lora" in settings.save else None
    forms.require_writable(settings.save, model.folder, _changing(parameters, of_lora), model.part)
    _place(model, settings, compute)
    identity = of_run(
        settings,
        [concept, *everything],
        base_hash=base_hash,
        mask_hash=None if given_mask is None else saliency_hash(given_mask),
        base=earlier and earlier.record,
        formula=method.formula,
        denoiser_hash=None if model.trains_denoiser else delta.content_hash(model.denoiser.state_dict()),
    )
    return Decisions(
        settings,
        method,
        concept,
        parts,
        earlier,
        model,
        parameters,
        given_mask,
        folder,
        cache_dir,
        identity,
        outputs=forms.planned(settings, folder, model.folder, model.part),
        default=default,
        truncated=truncated,
        compute=compute,
        accelerator=accelerator,
        quiet=quiet,
        tell=tell,
    )


def _in_scope(model: Family, settings: Settings, earlier: Base | None) -> Family:
    """The model with the network that the scope is of as the one that is trained.

    Raises:
        EraseError: there is no such scope; an option is about another network; the earlier run changed another one.
    """
    found, scope = model.for_scope(str(settings.scope)), settings.scope
    if not found.trains_denoiser:
        if processes.is_sharded():
            raise EraseError(
                f"weights that FSDP divides do not go with --scope {scope}; start with --multi_gpu instead"
            )
        own = f", {settings.method}'s own," if settings.rank == methods.find(settings.method).rank else ""
        given = {
            f"--unet {settings.unet}": settings.unet is not None,
            f"--rank {settings.rank}{own}": settings.rank is not None,
            "--weights bf16": settings.weights == "bf16",
        }
        for what, is_given in given.items():
            if is_given:
                raise EraseError(
                    f"{what} does not go with --scope {scope}, which trains the {found.part}; leave one out"
                )
    before = earlier and (earlier.part or model.part)
    if before not in (None, found.part):
        raise EraseError(
            f"--base {settings.base} is a run that changed the {before}, but --scope {scope} is of the {found.part}; "
            f"use a scope of the {before}, or give the folder as --model and not as --base"
        )
    return found


def _require_able(model: Family, settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError where the model has no images of the size or nothing that the method needs."""
    side = settings.resolution or model.resolution
    model.require_sides(f"--resolution is {side}", side)
    if isinstance(method, methods.TrainedMethod) and method.learns_words:
        _ = model.token_embeddings  # an error if there is none: words are learned in it
    if isinstance(method, methods.TrainedMethod) and method.attends:
        model.require_attention()
    if isinstance(method, methods.TrainedMethod) and method.trains_text:
        model.require_text_encoder()
    if isinstance(method, methods.ClosedForm):
        model.require_text_maps()


def _changing(parameters: Mapping[str, Parameter], mask: masks.Packed | None) -> dict[str, Parameter]:
    """The parameters of which a mask, if there is one, lets some weights change."""
    if mask is None:
        return dict(parameters)
    return {
        name: parameter for name, parameter in parameters.items() if name in mask and masks.count({name: mask[name]})
    }


def announce(decided: Decisions) -> None:
    """Print the first pair of forget prompt and anchor, truncated prompts, and how much memory is needed."""
    settings, model, tell = decided.settings, decided.model, decided.tell
    for part in concepts.apart(decided.all_concepts)[: len(decided.parts)]:
        tell(announcement(replace(part, others=decided.concept.others), settings, decided.method))
    if cut := decided.truncated:
        some = f"{cut[0][:60]!r}" + (f" and {len(cut) - 1} more" if len(cut) > 1 else "")
        tell(f"longer than the {model.max_tokens} tokens that the text encoder reads, and truncated: {some}")
    steps, method = settings.num_train_steps or 0, decided.method
    least = method.least_steps if isinstance(method, methods.TrainedMethod) else 1
    if 0 < steps < least:
        tell(
            f"{settings.method} as published needs at least {least} steps; with {steps} some of its loops are left out"
        )
    is_gpu = decided.compute.device.type == "cuda"
    if (settings.low_memory or is_gpu) and not processes.is_sharded():
        needs = needed_memory(settings, model, decided.parameters)
        if settings.low_memory:
            phases = ", ".join(f"{phase} {need / 1e9:.1f}" for phase, need in needs.items())
            tell(f"needs about {max(needs.values()) / 1e9:.1f} GB of memory ({phases})")
        if is_gpu and (line := _too_much(decided, needs)):
            tell(line)


def _too_much(decided: Decisions, needs: Mapping[str, int]) -> str | None:
    """A line about the phase that the GPU has too little memory for, by the estimate. Images alone adapt to it."""
    there = (w.nbytes for network in decided.model.networks for w in network.parameters() if w.device.type == "cuda")
    room = device.free_memory(decided.compute.device) + sum(there)
    phase, most = max(((phase, needs.get(phase, 0)) for phase in ("mask", "training", "solving")), key=itemgetter(1))
    need = most - memory.LIBRARIES
    if need <= room:
        return None
    less = "a smaller --density or --scope" if decided.settings.low_memory else "--low-memory"
    return f"{phase} needs about {need / 1e9:.1f} GB of the GPU's memory, and {room / 1e9:.1f} GB are free; try {less}"


def _consistent_method(settings: Settings) -> methods.TrainedMethod | methods.ClosedForm:
    require_consistent(settings)
    method = make_method(settings)
    if settings.erase_from is not None and not method.anchors:
        raise EraseError(
            f"--erase-from needs a method with anchors, which keep {settings.erase_from!r} itself; {settings.method} "
            "uses none, so choose another one, such as salun, ca or uce"
        )
    require_divisible(settings, method)
    if settings.alpha is not None and "alpha" not in method.hyperparameters():
        raise EraseError(f"--alpha is {settings.alpha:g}, but {settings.method} has no retain loss")
    return method


def _with_precision(
    settings: Settings, method: methods.Method, tell: Callable[[str], None]
) -> tuple[Settings, device.Compute]:
    """The settings with a precision, and where the run computes."""
    compute = device.choose(settings.device, settings.precision)
    if settings.precision is None and compute.precision == "fp16" and not can_scale(settings, method):
        compute = replace(compute, precision="fp32")
        tell("this GPU has no bf16, and fp16 does not go with these settings: computing in fp32")
    settings = replace(settings, precision=compute.precision)
    require_precision(settings, method)
    if settings.moments == "8bit" and isinstance(method, methods.TrainedMethod) and find_spec("bitsandbytes") is None:
        raise missing("bitsandbytes")
    return settings, compute


def _load(settings: Settings, cache_dir: Path, tell: Callable[[str], None]) -> Family:
    """The model on the CPU, in float32."""
    model = loading.load(
        settings.model,
        allow_pickle=settings.allow_pickle,
        unet=settings.unet,
        config=settings.config,
        revision=settings.revision,
        cache_dir=cache_dir,
    )
    for note in model.notes:
        tell(note)
    return model


def _place(model: Family, settings: Settings, compute: device.Compute) -> None:
    """Put the model on its device, ready to generate. Weights that are to be rounded never get there in float32."""
    if (dtype := dtype_to_generate(settings)) != torch.float32:
        model.round_network(dtype)
    memory.place_to_generate(model, compute.device, settings.resolution or model.resolution)
    model.use_attention(settings.attention)


def _at_once(settings: Settings, model: Family, folder: Path, compute: device.Compute, accelerator: Accelerator) -> int:
    """Images generated together: what fits the free memory of every process's GPU, or what the run was begun with."""
    if settings.low_memory:
        return SD_DEFAULTS["generation_batch_size"]
    if (folder / folders.RECORD).is_file() and not settings.overwrite:
        begun = folders.read(folder).identity["settings"].get("generation_batch_size")
        if isinstance(begun, int):
            return begun
    found = memory.images_at_once(model, settings.resolution or model.resolution, compute.device)
    return min(gather_object([found])) if accelerator.num_processes > 1 else found


def _filled(
    settings: Settings, concept: Concept, model: Family, compute: device.Compute, num_processes: int, at_once: int
) -> tuple[Settings, Callable[[str], Any]]:
    """The settings with every default filled in, and the value that each would have without its option.

    at_once: images generated together, where neither the user nor the model's folder says.
    """
    together = 1
    if settings.low_memory:
        together = memory.part_of_batch(model, settings.resolution or model.resolution)
    fill = partial(
        resolve,
        kind=concept.kind,
        model_defaults=model.defaults,
        num_processes=num_processes,
        part=together,
        at_once=at_once,
        guidance_scale=model.guidance_scale,
    )
    if compute.device.type == "cuda" and not processes.is_sharded():
        rounds = (
            settings.null_space is None and settings.optimizer == "adam" and not moves_weights(make_method(settings))
        )
        fill = partial(fill, can_round=rounds and model.for_scope(str(fill(settings).scope)) is model)

    def default(name: str) -> Any:
        return getattr(fill(replace(settings, **{name: Settings.__dataclass_fields__[name].default})), name)

    return fill(settings), default
