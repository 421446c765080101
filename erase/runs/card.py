"""The model card of a run folder."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from erase.concepts import Concept
from erase.delta import Delta
from erase.errors import printable
from erase.families.protocol import Family
from erase.options.settings import Settings


def model_card(
    settings: Settings,
    concept: Concept,
    change: Delta,
    *,
    family: type[Family],
    loading: str,
    after: Mapping[str, Any] | None = None,
    anchors: bool = True,
) -> str:
    """Markdown with the hub's YAML header: what was erased from what, how to load it, what it does not promise.

    Names and prompts are escaped, and of local paths only the last part is named: cards get published.

    family: of the model. loading: Python that loads the folder.
    after: the run that it continued from, as run.json says.
    anchors: False for a method that uses no anchor.
    """
    exactly = "bit for bit" if change.provenance.get("base_dtype") else "value for value"
    changed, total = sum(change.changed.values()), change.total
    return f"""---
{_header(settings.model, family)}
---

# {escaped(concept.name)} erased from {escaped(_place(settings.model))}

Made with erase-concept: method {settings.method}, recipe {settings.recipe}, mask {escaped(_place(str(settings.mask)))}.
{changed:,} of {total:,} weights of the {family.part} changed ({changed / total:.1%}); everything else is
the base model, byte for byte.
{_before(after)}
```python
{loading}
```

{_examples(concept, anchors)}

`delta.safetensors` holds the change: `erase-concept remove` restores the base model with it, {exactly}.
Base {change.base_hash[:12]}, result {change.result_hash[:12]} (content hashes of the {family.part}).

## Limits

Erasure makes a concept hard to reach by prompts; fine-tuning, learned embeddings or adversarial prompts can bring it
back. This card makes no claim about such attacks. The base model's licence applies to this folder too.

## Settings

| setting | value |
| --- | --- |
{_table(settings)}
"""


def _header(model: str, family: type[Family]) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=family.pipeline_tag,
        base_model=model if _is_hub_id(model) else None,
        license=family.licence(model),
        tags=[*family.tags, family.pipeline_tag, "diffusers", "concept-erasure", "machine-unlearning"],
    ).to_yaml()


def _before(after: Mapping[str, Any] | None) -> str:
    if not after:
        return ""
    base, erased, model = _place(after["run"]), ", ".join(after["concepts"]), _place(after["model"])
    return f"\nThe base is another run, {escaped(base)}, which had erased {escaped(erased)} from {escaped(model)}.\n"


def _examples(concept: Concept, anchors: bool) -> str:
    said = (
        f"'{escaped(forget)}' now means '{escaped(anchor)}'" if anchors else f"'{escaped(forget)}' is unlearned"
        for forget, anchor in concept.pairs()[:4]
    )
    return "\n".join(f"- {line}" for line in said)


def _table(settings: Settings) -> str:
    options = {key: value for key, value in asdict(settings).items() if _is_set(key, value)}
    return "\n".join(f"| {key} | {_listed(key, value)} |" for key, value in options.items())


_PATHS = {"model", "base", "unet", "config", "mask", "forget_images", "retain_images"}  # or names of other kinds
_HERE_ONLY = {"output", "cache_dir", "overwrite", "resume"}


def escaped(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>&|#~$])", r"\\\1", printable(text))


def _is_set(key: str, value: Any) -> bool:
    return key not in _HERE_ONLY and value is not None and value is not False and value != ()


def _listed(key: str, value: Any) -> str:
    """A setting's value as the card shows it."""
    values = [str(one) for one in (value if isinstance(value, tuple) else (value,))]
    names = [_place(one) if key in _PATHS or key == "concept" and one.endswith(".toml") else one for one in values]
    return escaped(", ".join(names))


def _is_hub_id(text: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)) and not Path(text).exists()


def _place(text: str) -> str:
    """A hub id or a name as it is; of a local path the last part."""
    return text if _is_hub_id(text) else Path(text).expanduser().resolve().name
