"""Image quality on prompts that the erasure should not change."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erase import files
from erase.concepts import Concept
from erase.data import prompt_files
from erase.errors import EraseError
from erase.evaluation.options import Options
from erase.evaluation.plan import Lines, Plan, clip_score, lines_of, whole
from erase.evaluation.rows import refuse_rows
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task, seed_of


class Quality(Task):
    """CLIP score, FID and KID on prompts that the erasure should not change."""

    about = "retain prompts or captions: CLIP score, FID and KID against base and real images"
    judges = ("clip-score", "features")

    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        """The prompts of a file with its seeds, guidance and sizes, or the concept's retain prompts in turn.

        num_images: images in all; without it one a prompt, or 500 of the retain prompts.
        """
        rows: Sequence[prompt_files.Row]
        note = ""
        if options.prompts:
            path = Path(options.prompts).expanduser()
            found = prompt_files.read(path)
            refuse_rows(path, found.rows)
            rows, note = found.rows, found.summary()
            source, num = files.file_hash(path), len(rows)
        elif concept is not None and concept.retain:
            rows = [prompt_files.Row(0, prompt) for prompt in concept.retain]
            source, num = f"retain prompts of {concept.name}", 500
        else:
            raise EraseError("the task quality needs captions: --prompts FILE, or --concept for its retain prompts")
        samples = []
        for i in range(options.num_images or num):
            row = rows[i % len(rows)]
            sample_id = f"caption-{i:05d}"
            seed = seed_of(self.name, sample_id) if row.seed is None or i >= len(rows) else row.seed  # no image twice
            size = {"guidance": row.guidance, "height": row.height, "width": row.width}
            samples.append(Sample(sample_id, row.prompt, seed, "retain", **size))
        chosen = {"prompts": source, "num_images": len(samples), "features": options.features}
        judges = ("features",) if options.features in {"mini", "mini-pixel"} else self.judges
        return self.sample_set(samples, chosen, judges=judges, note=note)

    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        columns = [whole(lines_of(lines, "features"))]
        if "clip-score" in lines:
            columns.append(clip_score(lines["clip-score"]))
        return Plan(columns, [], None, "quality.whole", [False] * len(samples))
