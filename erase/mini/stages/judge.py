"""The stage "judge": train the judge, and measure it on new drawings."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from erase import tensor_files
from erase.mini import judge as judging
from erase.mini import world
from erase.mini.fitting import fit
from erase.mini.job import Job


def train_judge(job: Job) -> None:
    torch.manual_seed(job.seed)
    judge = judging.Judge().to(job.device)

    def loss(step: int) -> Tensor:
        images, labels = judging.examples(job.rng("judge", step), job.budget.judge_batch)
        logits = judge(images.to(job.device))
        return torch.stack([F.cross_entropy(logits[head], labels[head].to(job.device)) for head in labels]).sum()

    path = job.work / "judge.pt"
    seconds = fit(path, {"judge": judge}, loss, steps=job.budget.judge_steps, lr=2e-3, ema_decay=0.98, quiet=job.quiet)
    judge.eval()
    rng = np.random.default_rng([job.seed, 99])
    scenes = [world.sample_scene(rng) for _ in range(2000)]
    answers = judging.name(judge.cpu(), [world.draw(scene, rng) for scene in scenes])
    truth = [{"object": s.object, "colour": s.colour or judging.NONE, "style": s.style or judging.NONE} for s in scenes]
    accuracy: dict[str, float] = {
        head: sum(a[head] == t[head] for a, t in zip(answers, truth, strict=True)) / len(truth)
        for head in judging.HEADS
    }
    metadata = {"accuracy": {**accuracy, "num_drawings": len(truth)}, "seed": job.seed, "seconds": seconds}
    tensor_files.write_tensors(job.work / "judge.safetensors", judge.state_dict(), metadata)
    path.unlink(missing_ok=True)
