"""The options of `erase-concept` about training; `settings` has the others.

Standard library only, so that the command line can be built from it without loading torch.
"""

from dataclasses import dataclass
from typing import Any, Literal

from erase.options.declare import Precision, option

SD_DEFAULTS: dict[str, Any] = {
    "num_forget": 800,
    "num_retain": 800,
    "guidance_scale": 7.5,
    "generation_batch_size": 8,
    "learning_rate": 1e-5,
    "batch_size": 8,
    "weight_decay": 0.0,
}


def of_salun(name: str) -> str:
    """A general default as the help shows it, where methods have their own."""
    return f"{SD_DEFAULTS[name]} for salun"


@dataclass(frozen=True)
class Training:
    """How weights are trained; see `Settings`."""

    learning_rate: float | None = option(
        None, "learning rate of Adam", group="training", least=0, most=1000, shown=of_salun("learning_rate")
    )
    lr_scheduler: Literal["constant", "cosine"] | None = option(
        None,
        "learning rate over the steps: constant, or cosine, which falls from --learning-rate to zero",
        group="training",
        shown="the method's own, constant for salun",
    )
    num_train_steps: int | None = option(
        None,
        "optimizer steps",
        group="training",
        least=0,
        most=10_000_000,
        shown="500 for salun, 100 for salun and nudity",
    )
    batch_size: int | None = option(
        None,
        "forget images per step, and as many retain images",
        group="training",
        least=1,
        most=100_000,
        shown=of_salun("batch_size"),
    )
    proportion_empty_prompts: float | None = option(
        None,
        "share of the retain rows whose prompt is replaced by the empty prompt, which guidance uses for every image",
        group="training",
        least=0,
        most=1,
        shown="the method's own, 0 for salun",
    )
    anchor_every: int | None = option(
        None,
        "in every N-th step, images of the anchor prompts are further retain rows under their own prompt; 0 for none",
        group="training",
        least=0,
        most=10_000_000,
        shown="the method's own, 0 for salun",
        metavar="N",
    )
    alpha_every: int = option(
        0,
        "every N steps, generate images of forget prompts: as long as any is nearer to the base's image of the concept "
        "than to that of the anchor, --alpha is halved, else it rises again; 0 keeps --alpha",
        group="training",
        least=0,
        most=10_000_000,
        metavar="N",
    )
    balancing: Literal["conflict", "hamu"] | None = option(
        None,
        "how forget and retain gradient are put together: conflict uses the retain gradient only where the two oppose "
        "each other, hamu takes the step that retains most and forgets enough; both ignore --alpha and need memory for "
        "two gradients",
        group="training",
        shown="the method's own, their sum for salun",
    )
    null_space: float | None = option(
        None,
        "change keys and values of cross-attention only in directions in which the text states of retain prompts have "
        "no part; 0: exactly none, a larger number: directions in which their mean square is below it (SPEED: 0.1)",
        group="training",
        least=0,
        most=1e6,
        shown="none",
    )
    rank: int | None = option(
        None,
        "train a change of this rank for each attention and feed-forward matrix in the scope, instead of single "
        "weights; --save lora is then exact",
        group="training",
        least=1,
        most=10_000,
        shown="4 for the method leco, else none",
    )
    weight_decay: float | None = option(
        None,
        "decoupled weight decay, inside the mask only",
        group="training",
        least=0,
        most=1e6,
        shown=of_salun("weight_decay"),
    )
    max_grad_norm: float | None = option(
        None,
        "largest norm of the masked gradient; larger ones are clipped",
        group="training",
        least=0,
        most=1e12,
        shown="the method's own, or none",
    )
    gradient_accumulation_steps: int = option(
        1, "parts into which each batch is split, to save memory", group="training", least=1, most=100_000
    )
    gradient_checkpointing: bool = option(False, "recompute activations to save memory", group="training")
    weights: Literal["fp32", "bf16"] | None = option(
        None,
        "dtype in which the network is stored during the mask pass and training; bf16 halves its memory and keeps "
        "float32 masters of the weights that may change; all other weights end as they were",
        group="training",
        shown="fp32; bf16 with --low-memory on a GPU",
    )
    optimizer: Literal["adam", "dual"] = option(
        "adam",
        "adam, or dual: Adam with moments of their own for the forget and the retain gradient (DualOptim), which needs "
        "a method with a retain loss and more memory",
        group="training",
    )
    moments: Literal["fp32", "8bit"] = option(
        "fp32",
        "storage of Adam's moments; 8bit needs a quarter of the memory and is approximate (needs bitsandbytes)",
        group="training",
    )
    low_memory: bool = option(
        False,
        "gradient checkpointing, batches in parts of one image (of more for a small model), and bf16 weights on a GPU; "
        "slower; prints how much memory it will need",
        group="training",
    )
    precision: Precision | None = option(
        None,
        "precision of all passes through UNet and VAE: generation, mask, training and samples.png; weights are always "
        "trained and saved in float32",
        group="training",
        shown="bf16 on a GPU, or fp16 if it lacks bf16; fp32 on a CPU",
    )
    attention: Literal["sdpa", "xformers"] = option("sdpa", "attention kernels", group="training")
    seed: int = option(0, "seed of data, mask and training", group="training", least=0, most=2**32 - 1)
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps (untested)", group="training", shown="a GPU if there is one", metavar="DEVICE"
    )
    checkpointing_steps: int = option(
        50, "optimizer steps between checkpoints", group="training", least=1, most=10_000_000
    )
    report_to: Literal["tensorboard", "wandb"] | None = option(
        None, "tracker for the losses", group="training", shown="none"
    )
    resume: bool = option(
        False, "fail if there is no unfinished run; without it an unfinished run is continued too", group="training"
    )
