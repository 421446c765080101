"""What the embedded model can be asked for: the words that it was shown, and the concepts made of them."""

import re
from pathlib import Path

from erase import concepts
from erase.concepts import refusal
from erase.errors import EraseError
from erase.families.pipeline_folder import DEFAULTS_FILE
from erase.mini import world
from erase.options.model_defaults import read_defaults
from erase.words import did_you_mean, listed

_WORDS = {*world.WORDS, *world.COLOURS}


def is_embedded(model: str) -> bool:
    """Whether the name or folder of a model says that it is the embedded one, or made from it; nothing is loaded."""
    return model == "mini" or read_defaults(Path(model) / DEFAULTS_FILE).get("family") == "mini"


def unknown_words(text: str) -> list[str]:
    """Words that the embedded model was never shown, in their order."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _WORDS]


def presets() -> list[str]:
    """Concepts of the embedded model's world, sorted."""
    names = concepts.names()
    return [name for name in names if concepts.load(name, model_family="mini").judge.get("type") == "mini"]


def require_name(name: str) -> None:
    """Refuse free text with a word that the embedded model was never shown; presets and files pass.

    Raises:
        EraseError: there is such a word, or the text involves minors.
    """
    if _is_preset(name):
        return
    refusal.refuse([name], "name", target=True)
    if strange := unknown_words(name):
        known = presets()
        guess = did_you_mean(name, known)
        raise EraseError(
            f"the embedded model does not know {strange[0]!r} (in --concept {name!r}); {guess}"
            f"it knows its presets only: {listed(known, 'and')}"
        )


def require_preset(name: str) -> None:
    """As `require_name`, and refuse free text of known words too: its prompts for other models have other words.

    Raises:
        EraseError: it is no preset and no file.
    """
    require_name(name)
    if not _is_preset(name):
        raise EraseError(
            f"--concept {name!r} is no preset of the embedded model; for free text it needs --kind, --forget and "
            f"--anchor; its presets are {listed(presets(), 'and')}"
        )


def _is_preset(name: str) -> bool:
    return name.lower().endswith(".toml") or concepts.preset_key(name) in concepts.names()
