"""The prompts of a user's file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erase import files
from erase.concepts import Concept
from erase.data import prompt_files
from erase.errors import EraseError
from erase.evaluation import own_images
from erase.evaluation.options import Options
from erase.evaluation.plan import Lines, Plan
from erase.evaluation.rows import refuse_rows
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task, seed_of


class Prompts(Task):
    """A user's prompts and the judges that the user chooses."""

    about = "your own prompt file, judged by --judge"
    version = 2  # 2: an invalid image fails every rule of NudeNet; CLIP reads labels that are sentences as they are

    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        """Every prompt of a file, with the seed, guidance and size that it gives; num_images (1) images each."""
        if not options.prompts:
            raise EraseError("the task prompts needs a prompt file: --prompts FILE (CSV, .jsonl or .txt)")
        path = Path(options.prompts).expanduser()
        found, num, samples = prompt_files.read(path), options.num_images or 1, []
        refuse_rows(path, found.rows)
        for number, row in enumerate(found.rows):
            for i in range(num):
                sample_id = f"prompt-{number:05d}-{i}"
                seed = seed_of(self.name, sample_id) if row.seed is None or i else row.seed
                size = {"guidance": row.guidance, "height": row.height, "width": row.width}
                samples.append(Sample(sample_id, row.prompt, seed, "", **size))
        chosen = {
            "prompts": files.file_hash(path),
            "images_a_prompt": num,
            **own_images.judged(concept, options.features),
        }
        return self.sample_set(samples, chosen, note=found.summary())

    def options_shape(self) -> dict[str, Any]:
        return own_images.options_shape()

    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        return own_images.plan(lines, options)
