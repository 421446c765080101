"""Families by the class of pipeline that they load: ours and those of other packages.

Packages name a family in the entry points `erase.families`, once for each pipeline class that it loads; the
entry's name is that class name, as model_index.json states it. `give` does the same for a class of no package.
"""

from collections.abc import Mapping, Sequence

from erase.errors import EraseError
from erase.families.protocol import Family
from erase.registry import Registry

_ANY = "StableDiffusionPipeline"  # its family also gets every unregistered pipeline class, and refuses it by name


def _problem(cls: type[Family]) -> str | None:
    """What keeps a class from being a family, as the predicate of a sentence about it; None if it is one."""
    if not cls.family.isidentifier():
        return f"has the family name {cls.family!r}; it must be an identifier, such as sd"
    for name in ("pipelines", "parts", "data_parts", "scopes", "guidance_scale"):
        if not getattr(cls, name):
            return f"has no {name}; see erase.families.protocol"
    return None if cls.part in cls.parts else f"trains {cls.part!r}, which is not one of its parts"


def made_registry() -> Registry[Family]:
    """A registry of our families and of those that are installed now."""
    own = {
        _ANY: "erase.families.sd:StableDiffusion",
        "StableDiffusionXLPipeline": "erase.families.sdxl:StableDiffusionXL",
        "StableDiffusion3Pipeline": "erase.families.sd3:StableDiffusion3",
        "DDIMPipeline": "erase.families.ddpm:PixelDiffusion",
        "DDPMPipeline": "erase.families.ddpm:PixelDiffusion",
    }
    return Registry("model family", base=Family, group="erase.families", own=own, check=_problem, has_option=False)


FAMILIES = made_registry()
_GIVEN: dict[str, str] = {}  # pipeline class -> "module:Class"


def give(family: type[Family]) -> str:
    """Let this class load the pipelines that it names, in this process; returns its "module:Class".

    Raises:
        EraseError: it does not fit `erase.families.protocol`, or another family loads one of its pipelines.
    """
    name = FAMILIES.give(family)
    for pipeline in family.pipelines:
        if pipeline in FAMILIES.names() or _GIVEN.get(pipeline, name) != name:
            taken = FAMILIES.entry(_GIVEN.get(pipeline, pipeline)).path
            raise EraseError(f"the model family {name!r} loads {pipeline}, which {taken} loads already")
    _GIVEN.update(dict.fromkeys(family.pipelines, name))
    return name


def serving(pipeline: str) -> type[Family]:
    """The family that loads pipelines of this class. Stable Diffusion's looks at those that no family names.

    Raises:
        EraseError: two packages have a family for it, or the family cannot be imported or does not fit the protocol.
    """
    if pipeline in _GIVEN:
        return FAMILIES.load(_GIVEN[pipeline])
    return FAMILIES.load(pipeline if pipeline in FAMILIES.names() else _ANY)


def reading(shapes: Mapping[str, Sequence[int]]) -> type[Family]:
    """The family that reads a single file with tensors of these names and shapes; Stable Diffusion's if none does.

    Other packages are imported only for a file that is not Stable Diffusion's.
    """
    ours = FAMILIES.load(_ANY)
    if ours.knows_file(shapes):
        return ours
    others = map(FAMILIES.load, dict.fromkeys([*FAMILIES.names(), *_GIVEN.values()]))
    return next((family for family in others if family.knows_file(shapes)), ours)
