"""I2P: prompts with their seeds, guidance and sizes, and nudity by NudeNet."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erase import files
from erase.concepts import Concept, refusal
from erase.data import prompt_files
from erase.errors import EraseError
from erase.evaluation import nudity
from erase.evaluation.options import Options
from erase.evaluation.plan import Group, Lines, Plan, lines_of
from erase.evaluation.rows import is_sexual
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task, seed_of

I2P_REPOSITORY = "AIML-TUDA/i2p"
I2P_ROWS = 4703
# SHA-256 of whole files, or their first digits where only these are published; "null" is whether row 2260 lost its word
I2P_FILES = {
    "6c1821aeeb20beb276b4e20ce4c4b801f9106dc935bafc9f6fd5e12aa2651e6f": "esd",
    "5e78f211b394": "original",
    "76f7c20b4d7b": "unlearndiffatk",
    "4c7abd9f17f6": "p4d",
}
I2P_CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")
_NULL_ROW = 2260  # its prompt is the word "Null", which readers with NA parsing lose


class I2P(Task):
    """I2P's prompts, of which NudeNet counts those that show nudity."""

    about = "I2P's 4,703 prompts (Schramowski et al., CVPR 2023), nudity by NudeNet"
    version = 3  # 3: an invalid image fails every rule; 2: which rows are refused, with minors beside sexual content
    judges = ("nudenet",)

    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        """Prompts with the seed, guidance and size that I2P gives each; num_images (1) images a prompt."""
        path = Path(options.prompts).expanduser() if options.prompts else _download_i2p()
        rows, name, note = read_i2p(path)
        chosen = [row for row in rows if in_subset(row.facts, options.subset)]
        if options.subset not in {"all", "nudity", *I2P_CATEGORIES}:
            raise EraseError(f"unknown I2P subset {options.subset!r}; choose all, nudity, {', '.join(I2P_CATEGORIES)}")
        drawn = [row for row in chosen if not refusal.shows_minors(row.prompt, is_sexual(row.facts))]
        num = options.num_images or 1
        samples = tuple(
            replace(row, id=f"{row.id}-{i}", seed=row.seed if i == 0 else seed_of(self.name, row.id, i))
            for row in drawn
            for i in range(num)
        )
        identity = {"subset": options.subset, "file": name, "num_rows": len(chosen), "images_a_prompt": num}
        return self.sample_set(samples, identity, refused=len(chosen) - len(drawn), note=note)

    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        lines_of(lines, "nudenet")
        columns, flagged = nudity.columns("i2p", lines)
        categories = [list(sample.facts["categories"]) for sample in samples]
        groups = [Group("categories", "Nudity by I2P category", "i2p.core5-0.6-image", categories)]
        return Plan(columns, groups, "i2p.clean", "i2p.people", flagged, nudity.threshold_curve("i2p", lines))


def read_i2p(path: Path) -> tuple[list[Sample], str, str]:
    """All rows of an I2P file in either published layout, the name of the copy that it is ("unknown" if none), and a
    line that says what was read.

    Read without NA parsing: a prompt "Null" or "nan" stays a text. Where a copy lost row 2260's prompt, the word
    "Null", it is restored.

    Raises:
        EraseError: the file cannot be read, lacks a column, or a field is no number; the message names it.
    """
    found = prompt_files.read(path, allow_blank=True)
    digest = files.file_hash(path)
    name = next((name for start, name in I2P_FILES.items() if digest.startswith(start)), "unknown")
    missing = [" or ".join(names) for key, names in prompt_files.COLUMNS.items() if key not in found.columns]
    missing += [c for c in ("categories", "nudity_percentage") if c not in found.rows[0].facts]
    if missing:
        raise EraseError(
            f"{path} is not I2P: it has no column {', '.join(missing)}; for prompts of your own use --task prompts"
        )
    if name != "unknown" and len(found.rows) != I2P_ROWS:
        raise EraseError(f"{path} has {len(found.rows)} rows, but I2P has {I2P_ROWS}")
    rows = []
    for number, row in enumerate(found.rows):
        where = f"{path}, line {row.line}"
        prompt = row.prompt
        if number == _NULL_ROW and len(found.rows) == I2P_ROWS and not prompt:
            prompt = "Null"
        if not prompt.strip():
            raise EraseError(f"{where}: the prompt is blank; write one or remove the line")
        absent = [key for key in ("seed", "guidance", "width", "height") if getattr(row, key) is None]
        if row.seed is None or absent:
            raise EraseError(f"{where}: {absent[0]} is blank; download the file again")
        try:
            facts = {
                "categories": [part.strip() for part in row.facts["categories"].split(",")],
                "nudity_percentage": float(row.facts["nudity_percentage"]),
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise EraseError(f"{where}: {error}; download the file again") from error
        size = {"guidance": row.guidance, "height": row.height, "width": row.width}
        rows.append(Sample(f"i2p-{number:04d}", prompt, row.seed, "forget", facts=facts, **size))
    return rows, name, found.summary()


def in_subset(facts: Mapping[str, Any], subset: str) -> bool:
    if subset == "all":
        return True
    return facts["nudity_percentage"] > 50 if subset == "nudity" else subset in facts["categories"]


def _download_i2p() -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        (name,) = [n for n in list_repo_files(I2P_REPOSITORY, repo_type="dataset") if n.endswith(".csv")]
        return Path(hf_hub_download(I2P_REPOSITORY, name, repo_type="dataset"))
    except Exception as error:  # the hub client's errors share no class; each means that the file cannot be downloaded
        raise EraseError(
            f"I2P cannot be downloaded from the hub ({' '.join(str(error).split())[:200]}); "
            "give a local copy: --prompts FILE"
        ) from error
