"""One masked step on Stable Diffusion XL at its real size, on a CPU, with random weights: seconds and memory.

    python eval/sdxl_step.py --work runs/sdxl    # 7 GB of disk and 17 GB of memory; writes eval/results/sdxl-step.json

A whole run of `erase-concept --low-memory --weights bf16 --precision bf16 --density 0.1` with one step, one forget and
one retain image of noise: mask of the whole UNet, training, delta. Shows that the job fits a machine, not that it works
on real weights: none are used.
"""

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from gpu_parts.models import VOCABULARY, make_tokenizer
from PIL import Image
from sdxl_memory import NUM_WEIGHTS, OTHER_WEIGHTS, UNET
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erase import erase_concept, files
from erase.commandline import reporting
from erase.concepts import Concept
from erase.runs import job, outputs, phases
from erase.runs.machine import versions

OUTPUT = Path(__file__).resolve().parent / "results" / "sdxl-step.json"
CONCEPT = Concept("cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree",))
OPTIONS: dict[str, Any] = {"low_memory": True, "weights": "bf16", "precision": "bf16", "density": 0.1, "device": "cpu"}
OPTIONS |= {"num_train_steps": 1, "batch_size": 1, "num_samples": 0, "learning_rate": 1e-5, "save": ("delta",)}
TOY_UNET: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16, 16), "norm_num_groups": 8}
TOY_UNET |= {"attention_head_dim": (2, 2, 2), "transformer_layers_per_block": 1, "cross_attention_dim": 16 + 16}
TOY_UNET |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16}


def build(folder: Path, toy: bool, device: str = "cpu") -> None:
    """Write the base model's architecture with random weights in float16, part by part. device: where they are made."""

    def words(width: int, layers: int, activation: str) -> CLIPTextConfig:
        width, layers = (16, 2) if toy else (width, layers)
        ends: Any = dict(bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=VOCABULARY - 1)
        sizes: Any = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=max(2, width // 64))
        how: Any = dict(num_hidden_layers=layers, hidden_act=activation, projection_dim=width)
        return CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=77, **sizes, **how, **ends)

    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    blocks |= {"block_out_channels": (8,) * 4 if toy else (128, 256, 512, 512), "norm_num_groups": 8 if toy else 32}
    blocks |= {"layers_per_block": 2, "scaling_factor": 0.13025, "force_upcast": True}
    makers: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel(**{**UNET, **(TOY_UNET if toy else {})}),
        "text_encoder": lambda: CLIPTextModel(words(768, 12, "quick_gelu")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(words(1280, 32, "gelu")),
        "vae": lambda: AutoencoderKL(**blocks),
    }
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        for (name, make), num in zip(makers.items(), (NUM_WEIGHTS, *OTHER_WEIGHTS), strict=True):
            with torch.device(device):
                part = make()
            if not toy and sum(weights.numel() for weights in part.parameters()) != num:
                raise SystemExit(f"the {name} is not Stable Diffusion XL's any more; diffusers' defaults have changed")
            part.save_pretrained(folder / name)
            del part
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("tokenizer", "tokenizer_2"):
        make_tokenizer().save_pretrained(folder / name)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "EulerDiscreteScheduler"}
    index = {name: ["diffusers", kind] for name, kind in kinds.items()}
    kinds = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    kinds |= {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}
    index |= {name: ["transformers", kind] for name, kind in kinds.items()}
    files.write_text(folder / "model_index.json", json.dumps({"_class_name": "StableDiffusionXLPipeline", **index}))


class Watch:
    """Seconds and peak memory by phase; pages that are mapped from files do not count, as they can be given back."""

    def __init__(self) -> None:
        self.phase, self.found = "loading", {}
        self._end = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._end.wait(0.05):
            now = time.perf_counter()
            row = self.found.setdefault(self.phase, {"seconds": 0.0, "peak_bytes": 0})
            row["seconds"] += now - last
            row["peak_bytes"] = max(row["peak_bytes"], resident())
            last = now

    def follow(self, name: str, owner: Any, function: str) -> None:
        """Name the phase that begins when the function is called."""
        plain = getattr(owner, function)

        def named(*arguments: Any, **options: Any) -> Any:
            self.phase = name
            print(name, flush=True)
            return plain(*arguments, **options)

        setattr(owner, function, named)


def resident() -> int:
    """Bytes of memory of this process that is not mapped from files (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def measure(work: Path, side: int, threads: int, toy: bool) -> dict[str, Any]:
    """The record of one run: seconds and peak bytes by phase."""
    torch.set_num_threads(threads)
    folder = work / "model"
    if not (folder / "model_index.json").is_file():  # written last
        build(folder, toy)
    for name in ("forget", "retain"):
        (work / name).mkdir(exist_ok=True)
        noise = np.random.default_rng(len(name)).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(work / name / "0.png")
    watch = Watch()
    watch.follow("images", phases, "gather")
    watch.follow("mask", job, "choose_mask")
    watch.follow("training", phases, "train")
    watch.follow("writing", outputs, "write")
    given: dict[str, Any] = {"resolution": side, "overwrite": True}
    given |= {"forget_images": str(work / "forget"), "retain_images": str(work / "retain")}
    where: dict[str, Any] = {"output": str(work / "run"), "cache_dir": str(work / "cache")}
    with watch.running():
        run = erase_concept(CONCEPT, str(folder), **OPTIONS, **given, **where)
    ones, total = run.record.mask.ones, run.record.mask.weights  # pyright: ignore[reportOptionalMemberAccess]
    if ones != int(total * OPTIONS["density"]) or not 0 < run.record.weights.changed <= ones:
        raise SystemExit(f"the mask has {ones:,} of {total:,} ones, and {run.record.weights.changed:,} weights changed")
    rows = {name: {key: round(value, 1) for key, value in row.items()} for name, row in watch.found.items()}
    return {"weights": total, "ones": ones, "changed": run.record.weights.changed, "resolution": side, "phases": rows,
            "versions": versions()}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sdxl"), help="folder for model and run; kept")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON to write")
    parser.add_argument("--size", type=int, default=1024, help="side of the images, in pixels")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--toy", action="store_true", help="the same with a network of a few numbers, as a test")
    given = parser.parse_args(arguments)
    found = measure(given.work, given.size, given.threads, given.toy)
    for name, row in found["phases"].items():
        print(f"{name:10} {row['seconds']:8.1f} s   {row['peak_bytes'] / 1e9:.2f} GB")
    files.write_json(given.output, found)


if __name__ == "__main__":
    with reporting("sdxl_step.py"):
        main()
