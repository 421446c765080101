"""The options of `unlearn-classifier`, each with its meaning and default.

Standard library only, so that the command line can be built from it without loading torch.
"""

from dataclasses import InitVar, dataclass, replace
from typing import Any, Literal

from erase.classification.presets import MOST_SIZE, PRESETS, TRAINING, TUNED, Kind, Preset
from erase.errors import EraseError
from erase.options.declare import Precision, agreed_precision, flag, make_plain, option

NETWORKS = ("mlp", "small", "resnet9s", "resnet18", "resnet18_imagenet", "resnet50", "vgg16_bn", "vit", "swin_t")


def _others() -> tuple[str, ...]:
    """Methods of other packages; called for a name that is not ours."""
    from erase.classification.methods import others

    return others()


@dataclass(frozen=True)
class Settings:
    """The options of `unlearn-classifier`, in the order of `--help`. None means what `--help` shows."""

    # what
    data: str = option(
        "digits", "digits, drawings, cifar10, cifar100, svhn, tiny-imagenet, imagenette, or a folder", group="what"
    )
    forget: str = option(
        "10%",
        "what to forget: a share of the training images (10%), a class (class:3, class:cat), or a file of indices",
        group="what",
    )
    output: str | None = option(None, "output folder", group="what", shown="runs/<data>-<method>", metavar="DIR")
    network: str | None = option(None, "architecture", group="what", choices=NETWORKS, shown="depends on --data")
    split: Literal["seeded", "reference"] = option(
        "seeded",
        "how the images to forget are chosen: by --seed, or as in SalUn's code",
        group="what",
    )
    size: int | None = option(
        None,
        "side in pixels to which images of a folder or of the hub are cropped and scaled",
        group="what",
        least=1,
        most=MOST_SIZE,
        shown="size of the images",
    )

    num_train: int | None = option(
        None,
        "number of training images, the first ones of each class",
        group="what",
        least=2,
        most=1_000_000_000,
        shown="all",
    )
    tuned_for: str | None = option(
        None,
        "use the settings tuned for this data set, for a folder with its images",
        group="what",
        choices=tuple(name for name in TRAINING if name != "default"),
        shown="name of --data",
    )

    # method
    method: str = option(
        "salun",
        f"unlearning method: {', '.join(PRESETS)}, a name of another package, or module:Class",
        group="method",
        choices=tuple(PRESETS),
        more=_others,
        also="module:Class",
        metavar="METHOD",
    )
    model: str | None = option(
        None,
        "folder or file of the original model, also a ResNet of SalUn's code (.pth.tar)",
        group="method",
        shown="trained first",
        metavar="DIR",
    )
    allow_pickle: bool = option(
        False, "read a .pth.tar file, which can contain code; only tensors are read", group="method"
    )
    set: tuple[str, ...] = option(
        (), "hyperparameter of the method, such as alpha=0.5; may be repeated", group="method", metavar="NAME=X"
    )

    # how
    mask: str | None = option(
        None,
        "weights that may change: saliency, random, inverse, none, or a mask file",
        group="how",
        shown="saliency for salun, salun-joint and salun-do, else none",
    )
    density: float | None = option(
        None,
        "share of the weights that may change, above 0 and at most 1",
        group="how",
        shown="0.5; 0.9 for salun, half of the images and cifar10",
    )
    score: Literal["abs_sum", "sum_abs", "sum_sq"] = option(
        "abs_sum", "saliency score: |sum g| (as in SalUn's code), sum |g| or sum g^2", group="how"
    )
    per_tensor: bool = option(False, "same density in every tensor instead of one global threshold", group="how")
    batch_norm: Literal["frozen", "moving"] | None = option(
        None,
        "batch normalisation statistics during unlearning: moving as in SalUn's code (masks do not apply), or frozen",
        group="how",
        shown="moving; frozen for digits and drawings",
    )

    # training
    epochs: int | None = option(
        None,
        "epochs of unlearning",
        group="training",
        least=0,
        most=100_000,
        shown="depends on --method, --data and --forget",
    )
    learning_rate: float | None = option(
        None,
        "learning rate of unlearning",
        group="training",
        least=0,
        most=1e30,
        shown="depends on --method, --data and --forget",
    )
    optimizer: Literal["sgd", "adam"] | None = option(
        None, "optimizer of unlearning", group="training", shown="sgd, except for scrub: adam"
    )
    batch_size: int | None = option(
        None, "images per step", group="training", least=1, most=1_000_000, shown="depends on --data"
    )
    momentum: float = option(0.9, "momentum of SGD", group="training", least=0, most=1)
    weight_decay: float = option(5e-4, "weight decay, inside the mask only", group="training", least=0, most=1000)
    train_epochs: int | None = option(
        None,
        "training epochs of the original and the retrained model",
        group="training",
        least=0,
        most=100_000,
        shown="depends on --data",
    )
    train_learning_rate: float | None = option(
        None,
        "initial learning rate of the original and the retrained model; cosine schedule to 0",
        group="training",
        least=0,
        most=1e30,
        shown="depends on --data",
    )
    precision: Precision | None = option(
        None,
        "precision of training and mask passes; on a CPU bf16 is fast only with AVX512_BF16 or AMX",
        group="training",
        shown="bf16 on a GPU, or fp16 if it lacks bf16; fp32 on a CPU",
    )
    seed: int = option(0, "seed of split, training and unlearning", group="training", least=0, most=2**32 - 1)
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps (untested)", group="training", shown="a GPU if there is one", metavar="DEVICE"
    )
    mixed_precision: InitVar[str | None] = None  # `precision` under the name that diffusers' scripts give it

    def __post_init__(self, mixed_precision: str | None) -> None:
        object.__setattr__(self, "precision", agreed_precision(self.precision, mixed_precision))
        make_plain(self)
        if self.density is not None and not 0 < self.density <= 1:
            raise EraseError(f"--density is {self.density}; it must be above 0 and at most 1")

    @property
    def preset(self) -> Preset:
        """Defaults of the method for this data set and this kind of request."""
        if self.method not in PRESETS:
            from erase.classification.methods import preset  # loads torch, which `--help` does not need

            return preset(self.method)
        return TUNED.get((self.tuned_for or self.data, kind_of(self.forget)), {}).get(self.method, PRESETS[self.method])

    def resolved(self) -> "Settings":
        """The settings with every None filled in except model, size, num_train, tuned_for and device.

        The preset's options come before those of `set`, which replace them.
        """
        from erase.device import choose  # loads torch, which `--help` does not need

        preset = self.preset
        training = TRAINING.get(self.tuned_for or self.data, TRAINING["default"])
        defaults: dict[str, Any] = {
            "output": f"runs/{self.data.strip('/').rpartition('/')[2]}-{self.method}",
            "network": training.network,
            "mask": preset.mask,
            "density": preset.density,
            "epochs": preset.epochs,
            "learning_rate": preset.learning_rate,
            "optimizer": preset.optimizer,
            "batch_size": training.batch_size,
            "train_epochs": training.epochs,
            "train_learning_rate": training.learning_rate,
            "batch_norm": training.batch_norm,
            "precision": choose(self.device, self.precision).precision,
        }
        given = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **given, set=(*(f"{name}={value}" for name, value in preset.options), *self.set))

    def method_options(self) -> dict[str, str]:
        """`set` as names and values; of two with the same name the later one counts."""
        pairs = [text.partition("=") for text in self.set]
        for name, equals, _ in pairs:
            if not equals:
                raise EraseError(f"--set is {name!r}; it must be NAME=VALUE, like alpha=0.5")
        return {name: value for name, _, value in pairs}


def kind_of(forget: str) -> Kind:
    """The kind of a request: "class", "half" (30 % of the images or more) or "share"; a file counts as "share"."""
    if forget.startswith("class:"):
        return "class"
    number = forget.removesuffix("%")
    is_share = number != forget and number.replace(".", "", 1).isdecimal()
    return "half" if is_share and float(number) >= 30 else "share"


def require_use(settings: Settings) -> None:
    """Raise an EraseError for an option that the method does not use; for settings that are not resolved yet."""
    preset = settings.preset
    unused: tuple[str, ...] = ()
    why = f"with --method {settings.method}"
    if not preset.method:
        unused, why = ("epochs", "learning_rate", "optimizer", "mask", "batch_norm"), "when a new model is trained"
    elif not preset.epochs:
        unused, why = ("epochs", "learning_rate", "optimizer"), f"{why}, which computes the new weights in one step"
    given = [name for name in unused if _is_given(settings, name)]
    if given:
        hint = f"; use {flag('train_' + given[0])}" if f"train_{given[0]}" in Settings.__dataclass_fields__ else ""
        raise EraseError(f"{flag(given[0])} has no effect {why}{hint if not preset.method else ''}")
    if (settings.mask or preset.mask) == "none":
        for name in ("density", "score", "per_tensor"):
            if _is_given(settings, name):
                raise EraseError(f"{flag(name)} has no effect without a mask; add --mask saliency")


def _is_given(settings: Settings, name: str) -> bool:
    return getattr(settings, name) != Settings.__dataclass_fields__[name].default
