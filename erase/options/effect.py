"""Options that contradict each other, or that would do nothing."""

from erase.errors import EraseError
from erase.options.settings import Settings, hyperparameter_name

# settings without effect in a closed form, and those without effect where no images are needed either
OF_TRAINING = ("learning_rate", "lr_scheduler", "num_train_steps", "weight_decay", "max_grad_norm")
OF_TRAINING += ("alpha_every", "balancing", "null_space", "optimizer", "moments")
OF_IMAGES = ("num_forget", "num_retain", "forget_images", "retain_images", "batch_size", "gradient_accumulation_steps")


def require_consistent(settings: Settings) -> None:
    """Check what the user gave, before anything is filled in.

    Raises:
        EraseError: two options contradict each other, or one would do nothing.
    """
    if settings.resume and settings.overwrite:
        raise EraseError("--resume continues what --overwrite deletes; leave one out")
    if settings.lora_rank is not None and "lora" not in settings.save:
        raise EraseError(f"--lora-rank {settings.lora_rank} is for --save lora, which is not asked for; add it")
    of_alpha = settings.alpha or "alpha" in map(hyperparameter_name, settings.set)
    if settings.balancing is not None and of_alpha:
        raise EraseError(f"--alpha has no effect with --balancing {settings.balancing}; leave one out")
    for kind in ("forget", "retain"):
        num, folder = getattr(settings, f"num_{kind}"), getattr(settings, f"{kind}_images")
        if num is not None and folder is not None:
            raise EraseError(f"--num-{kind} {num} has no effect with --{kind}-images; leave one out")
    if settings.alpha is not None and "alpha" in map(hyperparameter_name, settings.set):
        raise EraseError(f"--alpha {settings.alpha:g} and --set alpha are both given; leave one out")
