"""The contract of a method: its formula, and every optional part with its default.

Derive from `TrainedMethod` or `ClosedForm`, as a frozen dataclass whose fields are the hyperparameters:

    @dataclass(frozen=True)
    class Unconditional(TrainedMethod):
        weight: float = 1.0

        def loss(self, model, frozen, batch):
            with torch.no_grad():
                target = model(batch.x_forget, batch.t_forget, batch.c_empty)
            yield "forget", self.weight * mse_loss(model(batch.x_forget, batch.t_forget, batch.c_forget), target)

A class that defines the same parts without deriving is a method too. Either is checked when it is registered: any
public attribute that is neither a hyperparameter nor a part below is an error, so that no part can be misspelt.
"""
# pyright: strict

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from erase.words import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from erase.methods.inputs import Batch, Predictor, Text

Images = Literal["concept", "anchor", "trajectory", "noise", "uniform"]
Follows = Literal["base", "edited", "average"]
_TERMS = "loss", "together"
Balance = Callable[["Tensor", "Tensor", "Tensor"], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Turn:
    """What one step of the loop does; by default it minimises the whole loss and nothing else.

    terms: the factor of each term of the loss that the step descends; None: all terms, each with factor 1.
    remember: keep a copy of the weights that may change, as they are before the step.
    rewind: put the weights back to the last copy before the step; the optimizer's moments stay.
    renew: the optimizer starts again before the step, without moments.
    rate: factor of the learning rate.
    """

    terms: Mapping[str, float] | None = None
    remember: bool = False
    rewind: bool = False
    renew: bool = False
    rate: float = 1.0


@dataclass(frozen=True)
class WordAttack:
    """Words that are learned on the edited model between the steps, so that they bring the concept back.

    num_words: they take turns; each keeps its embedding and Adam's moments until its next turn.
    every: steps of the training from one attack to the next. 0: the training has num_words + 1 rounds of equal length;
        each round but the last ends with an attack, on a new word, and `Batch.c_words` has all words found so far.
    num_steps: of Adam, on one word, in an attack.
    batch_size: images of the concept in each of them. learning_rate: of Adam, in units of the token embeddings.
    restart_after: a word starts again after so many of its own steps.
    """

    num_words: int
    every: int
    num_steps: int
    batch_size: int
    learning_rate: float
    restart_after: int

    def round_of(self, num_steps: int) -> int:
        """Steps from one attack to the next, of a training of `num_steps`."""
        return self.every or max(1, num_steps // (self.num_words + 1))


@dataclass(frozen=True)
class PrefixAttack:
    """One embedding before each forget prompt, learned anew in each step of the training so that the edited model
    predicts on this step's latents what the base predicts for the prompt alone.

    warm_up: steps of the training before the first attack. num_steps, learning_rate: of Adam, in units of the token
    embeddings; it starts at the embedding of a random token. signed: Adam sees the sign of the gradient only.
    """

    warm_up: int
    num_steps: int
    learning_rate: float
    signed: bool = False


class Method:
    """Attributes of both kinds of methods.

    anchors: False if the method does not use the anchor, the prompt that replaces the forget prompt.
    settings: settings of the authors that differ from the general defaults: a mapping of scope, mask,
        target, learning_rate, lr_scheduler, num_train_steps, batch_size, proportion_empty_prompts, anchor_every, rank,
        weight_decay, max_grad_norm, num_forget and num_inference_steps. Under "nudity", a mapping of those for nudity.
        Options of the user win.
    settings_for: settings for the models whose erase_defaults.json has this "family", such as "mini" for the embedded
        model, in the form that the file has under "methods". The file itself wins.
    formula: version number of the method's computation and default hyperparameters. Raise it with every change: runs
        with different numbers are different runs.
    """

    anchors: Any = True
    settings: ClassVar[Mapping[str, Any]] = {}
    settings_for: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    formula: int = 1

    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter by name."""
        instance: Any = self
        return asdict(instance)

    @property
    def retains(self) -> bool:
        """False if no retain images are needed; none are generated then."""
        return True


class TrainedMethod(Method, ABC):
    """A method that trains: the loop minimises `loss`. All other parts are optional.

    images: what the forget latents of a batch are: noised images of the "concept", noised images of its "anchor"
        under the forget prompt, stored points on the base model's "trajectory" from noise to the concept, "noise":
        points on a new trajectory in each step, of the model that `follows` names, or noised "uniform" latents, which
        are drawn from [-1, 1].
    teacher_decay: d of the running average of the weights, average = d * average + (1 - d) * weights. Trajectories are
        then generated with the average, and the average is the result. None: no average is kept. A method may make it a
        hyperparameter.
    prepare_batches: the number of batches over which the gradients for `prepare` are summed; 0: no preparation.
    curvature_batches: the number of batches over which squared gradients for `pull` are averaged; 0: no `pull`.
    trains_text: True if `loss` calls `model.text_attention`: only scopes of a text encoder are accepted then.
    retain_images: False if the retain loss uses `Batch.c_retain` alone; no retain images are generated then.
    detaches_start: True if no gradient passes the key and the value of the start token in cross-attention.
    attends: True if `loss` calls `model.attention`; models without cross-attention layers are then refused before the
        first image.
    """

    images: Any = "concept"
    detaches_start: bool = False
    attends: bool = False
    trains_text: bool = False
    retain_images: bool = True
    teacher_decay: Any = None
    prepare_batches: int = 0
    curvature_batches: int = 0

    @abstractmethod
    def loss(self, model: "Predictor", frozen: "Predictor", batch: "Batch") -> "Iterator[tuple[str, Tensor]]":
        """Yield the named terms of the loss, already weighted: "forget", and "retain" if `retains`.

        Each term is backpropagated before the next one is computed, so that only one graph is in memory.

        frozen: the base model if `needs_base`, else the model itself.
        """

    def together(self, model: "Predictor", frozen: "Predictor", batch: "Batch") -> "Mapping[str, Tensor]":
        """All terms of `loss` by name, from fewer and larger passes; their sum is backpropagated at once.

        Equal to `loss` up to rounding. The loop asks for it on a GPU that has room for it, if the method defines it,
        retains, and compares no gradients.
        """
        raise NotImplementedError

    @property
    def needs_base(self) -> bool:
        """True if `loss` calls `frozen`; the loop then keeps the base's values of the weights that may change."""
        return False

    @property
    def balance(self) -> Balance | None:
        """A function (<g_f, g_f>, <g_f, g_r>, <g_r, g_r>) -> (w_f, w_r), the factors of the forget and the retain
        gradient, all float64 tensors without dimensions. None: both are 1. Reading a number (`float`, `if`) makes a GPU
        wait in each step.
        """
        return None

    @property
    def attack(self) -> WordAttack | None:
        """Words to learn during the training from the forget images, which must show the "concept". Batches then have
        `c_words`, with the word that was attacked last or all that were found. A term of the loss that is neither
        "forget" nor "retain" is allowed for them; with a `balance` it is part of the forget gradient. None: no words
        are learned.
        """
        return None

    @property
    def prefix(self) -> PrefixAttack | None:
        """An embedding to learn in each step. After the warm-up, batches have `c_words`: the forget prompts behind it.
        Not together with an `attack`. None: none is learned.
        """
        return None

    @property
    def learns_words(self) -> bool:
        """Whether words or prefixes are learned during the training. Not to be overridden."""
        return self.attack is not None or self.prefix is not None

    @property
    def follows(self) -> Follows | None:
        """The model that generates a step's trajectories if `images` is "noise": the base, the edited model, or the
        average. None: there are none, and the noise itself is seen.
        """
        return None if self.teacher_decay is None else "average"

    def prepare_loss(self, model: "Predictor", batch: "Batch") -> "Tensor":
        """The loss whose gradients `prepare` gets; by default the forget term."""
        return dict([next(self.loss(model, model, batch))])["forget"]

    def prepare(
        self,
        weights: "Mapping[str, Tensor]",
        gradients: "Mapping[str, Tensor]",
        shapes: Mapping[str, tuple[int, ...]],
        draw: "torch.Generator",
    ) -> None:
        """Change weights in place before the first step.

        weights: those that may change, by parameter, flat. gradients: of the same shape, the sum of |gradient of
            `prepare_loss`| over `prepare_batches` batches. shapes: of the whole parameters.
        """

    def curvature_loss(self, model: "Predictor", batch: "Batch") -> "Tensor":
        """The loss whose squared gradients at the base `pull` gets; by default the retain term."""
        return dict(self.loss(model, model, batch))["retain"]

    def pull(self, moved: "Mapping[str, Tensor]", curvature: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """A gradient that is added to that of the loss in each step, of the same names and shapes as `moved`.

        moved: how far the weights that may change are from the base, by parameter, flat. curvature: the mean of the
            squared gradient of `curvature_loss` at the base over `curvature_batches` batches.
        """
        return {}

    def shrink(self, moved: "Mapping[str, Tensor]", step: int, num_steps: int) -> None:
        """Change, in place after each step, how far the weights that may change are from the base."""

    def turn(self, step: int, num_steps: int) -> Turn:
        """What the step does, counted from 0. The first step must remember if any later one rewinds."""
        return Turn()

    @property
    def least_steps(self) -> int:
        """The fewest steps with which every part of the method takes place; a run with fewer says so."""
        return 1

    @property
    def turns(self) -> bool:
        """Whether the method defines `turn`. Not to be overridden."""
        return type(self).turn is not TrainedMethod.turn

    @property
    def joins(self) -> bool:
        """Whether `together` is of the class that defines `loss`, or of one that derives from it. Not to be overridden.

        A class that overrides `loss` alone has other terms than the `together` that it inherits.
        """
        definers = {name: [n for n, cls in enumerate(type(self).__mro__) if name in vars(cls)] for name in _TERMS}
        is_own = type(self).together is not TrainedMethod.together
        return is_own and definers["together"][0] <= definers["loss"][0] and self.retains and self.balance is None

    @property
    def prepares(self) -> bool:
        """Whether the method defines `prepare`, and has batches for it. Not to be overridden."""
        return type(self).prepare is not TrainedMethod.prepare and self.prepare_batches > 0

    @property
    def pulls(self) -> bool:
        """Whether the method defines `pull`, and has batches for it. Not to be overridden."""
        return type(self).pull is not TrainedMethod.pull and self.curvature_batches > 0

    @property
    def shrinks(self) -> bool:
        """Whether the method defines `shrink`. Not to be overridden."""
        return type(self).shrink is not TrainedMethod.shrink


class ClosedForm(Method, ABC):
    """A method that computes the new weights without training.

    values_only: `solve` gets only the maps that make values of cross-attention, not those that make keys.
    """

    values_only: bool = False

    @abstractmethod
    def solve(self, weights: "Mapping[str, Tensor]", text: "Text") -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """The new weights by name, and notes on the solution for run.json.

        weights: the linear maps of the text states in the scope (in Stable Diffusion keys and values of
            cross-attention), [out, in] each; those that are missing in the answer stay as they are.
        """


def problem(cls: type) -> str | None:
    """What keeps a class from being a method, as the predicate of a sentence about it; None if it is one."""
    formulas = [name for name in ("loss", "solve") if callable(getattr(cls, name, None))]
    if not is_dataclass(cls) or not formulas:
        return "is no dataclass with a loss or a solve; see erase.methods.protocol"
    if len(formulas) == 2:
        return "has a loss and a solve; a method has one of them"
    kind = _kind(cls)
    parts = {name for name in dir(kind) if not name.startswith("_")}
    hyperparameters = {item.name for item in fields(cls)}
    for name in sorted({name for name in dir(cls) if not name.startswith("_")} - parts - hyperparameters):
        guess = did_you_mean(name, [*parts, *hyperparameters]).strip()
        hint = guess or "start its name with an underscore if it is only a helper"
        return f"has {name!r}, which is neither a hyperparameter nor a part of a {kind.__name__}; {hint}"
    return _trained_problem(cls) if kind is TrainedMethod else None


def _trained_problem(cls: Any) -> str | None:
    images = getattr(cls, "images", TrainedMethod.images)
    if isinstance(images, str) and images not in get_args(Images):
        return f"has the images {images!r}; choose {', '.join(get_args(Images))}"
    defines = getattr(cls, "prepare", TrainedMethod.prepare) is not TrainedMethod.prepare
    if getattr(cls, "pull", TrainedMethod.pull) is not TrainedMethod.pull and not getattr(cls, "curvature_batches", 0):
        return "has pull but not curvature_batches, the number of batches that it needs"
    given = getattr(cls, "prepare_batches", 0) != 0 or "prepare_batches" in {item.name for item in fields(cls)}
    if defines and not given:
        return "has prepare but not prepare_batches, the number of batches that it needs"
    return None


def _kind(cls: type) -> type[Method]:
    return TrainedMethod if callable(getattr(cls, "loss", None)) else ClosedForm


@functools.cache
def derived(cls: Any) -> Any:
    """The class itself, or a subclass with the defaults of the protocol for one that does not derive from it."""
    if issubclass(cls, Method):
        return cls
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls, _kind(cls)), names)
