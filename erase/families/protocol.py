"""The contract of a model family: what the rest of the package may ask of a model of any architecture."""
# pyright: strict, reportPrivateImportUsage=false

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import Parameter

from erase import delta
from erase.conditioning import Conditioning
from erase.device import place_of
from erase.errors import EraseError
from erase.families import turns
from erase.families.prompted import Prompted
from erase.families.prompted import TokenRun as TokenRun
from erase.families.scope import inside, no_scope
from erase.families.stored import Stored
from erase.families.supported import Model
from erase.guards import Guard

Sampler = Literal["model", "dpm++"]


class Family(Stored, Prompted):
    """A loaded model of one architecture. A family is a subclass in a file of its own, see `erase.families.registry`.

    Called with (x, t, c) it predicts the noise in the latents x, [n, c, h, w], at timesteps t, int64 [n], for the
    conditioning c. `methods` use nothing else of it; `training` updates `network`; `data` needs latents and text
    states; `export` copies the unchanged parts from `folder`.

    Every optional part is declared with its default: what is about folders and files in `Stored`, what is about prompts
    in `Prompted`, and all else here.

    family: name of the architecture, an identifier. pipelines: pipeline classes in model_index.json that it loads; the
        first one opens the folders that are written. pipeline_module: the module of that class.
    part: subfolder of the network that is trained, and the prefix of its weights' names in deltas.
    other_parts: subfolders of other networks that can be trained instead, see `trains`.
    parts: all subfolders that determine an image. data_parts: those for latents and text states.
    num_timesteps: of the training schedule. scopes: by name, the parameters that may be trained. "full" is all of them;
        the presets of methods use the names in `scope.SCOPES`.
    guidance_scale: default guidance of generated images; 1 is none.
    takes_guards: whether `guard` has an effect on generated images.
    pipeline_tag: of the model card: what the model does, as the hub calls it. tags: additional tags of the card.
    licences: of models on the hub, by the beginning of their ids.
    models: the kinds of models that it is tested on, for the table of supported models.

    folder: the diffusers folder of the model.
    classes: class names of a class-conditional model, whose prompts they are; () for a model of text.
    defaults: the content of its erase_defaults.json, and "family": "mini" for the embedded model's world.
    guard: an inference-time guard that is active whenever the model generates.
    notes: lines for the user about how the model was loaded.
    precision: of the network and the VAE in passes without gradients; their outputs are float32.
    stored_hashes: what `hash_of` said of `parts` whose weights cannot be read any more, by `part` and theirs.
    """

    part: ClassVar[str] = "unet"
    other_parts: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    data_parts: ClassVar[tuple[str, ...]] = ()
    num_timesteps: ClassVar[int] = 1000
    scopes: ClassVar[Mapping[str, Callable[[str], bool]]] = {}
    guidance_scale: ClassVar[float] = 0.0  # to be stated
    takes_guards: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-to-image"
    tags: ClassVar[tuple[str, ...]] = ()
    models: ClassVar[tuple[Model, ...]] = ()

    name: str
    folder: Path
    classes: tuple[str, ...] = ()
    defaults: dict[str, Any]
    guard: Guard | None
    notes: tuple[str, ...]
    precision: str
    stored_hashes: Mapping[tuple[str, str], str] = MappingProxyType({})

    # --- the network that is trained ---

    @property
    @abstractmethod
    def network(self) -> ModelMixin:
        """The network that is trained."""

    @property
    def denoiser(self) -> ModelMixin:
        """The network that predicts noise: by default the one that is trained."""
        return self.network

    @property
    def trains_denoiser(self) -> bool:
        return self.denoiser is self.network

    @classmethod
    def trains(cls, part: str) -> "type[Family]":
        """The class of these models when `part` is the network that is trained.

        Raises:
            EraseError: this family trains no such part.
        """
        if part != cls.part:
            raise EraseError(f"{cls.family} models have no {part!r} that can be trained; give another model")
        return cls

    def training(self, part: str) -> "Family":
        """This model with `part` as the network that is trained; everything is shared. See `trains`."""
        cls = self.trains(part)
        if cls is type(self):
            return self
        twin: Any = copy.copy(self)
        twin.__class__ = cls
        return twin

    def for_scope(self, scope: str) -> "Family":
        """This model with the network that the scope is of as the one that is trained.

        Raises:
            EraseError: this family has no such scope.
        """
        scopes = {part: self.trains(part).scopes for part in (self.part, *self.other_parts)}
        found = next((part for part, own in scopes.items() if scope in own), None)
        if found is None:
            raise no_scope(scope, [name for own in scopes.values() for name in own])
        return self.training(found)

    @abstractmethod
    def stored_network(self) -> ModelMixin:
        """The base's network once more, read from the folder, in float32 on the CPU."""

    def stored_weights(self) -> delta.State:
        """The base's weights by name, in float32, as they are in the folder; by default those of `stored_network`.

        A family that can read them one by one saves memory.
        """
        return self.stored_network().state_dict()

    @classmethod
    def state_of(cls, network: nn.Module) -> delta.State:
        """The weights of a network of this family on the CPU, under their names in deltas."""
        return delta.of_component(cls.part, {name: w.detach().cpu() for name, w in network.state_dict().items()})

    def trainable(self, scope: str) -> dict[str, Parameter]:
        """The network's parameters in the scope, by name.

        Raises:
            EraseError: this family has no such scope, or the network has nothing in it.
        """
        return inside(dict(self.network.named_parameters()), scope, self.scopes)

    def to(self, device: torch.device) -> None:
        """Move the network and all other parts to the device."""
        for network in self.networks:
            network.to(device)

    @property
    def device(self) -> torch.device:
        return place_of(self.network)

    @property
    def networks(self) -> list[nn.Module]:
        """All networks that determine an image, each once; loaded again if they were released."""
        return list(dict.fromkeys([self.denoiser, self.network]))

    @property
    def takes_turns(self) -> bool:
        """Whether its networks are on the device only while they compute; see `take_turns`."""
        return hasattr(self.denoiser, "_hf_hook")

    def take_turns(self, device: torch.device, room: int) -> None:
        """Let each network come to the device when it computes, and the others go back to the CPU then.

        For images alone, until `release`: a network has no gradients meanwhile. Results are the same bits.

        room: bytes of the device for weights. A network with more comes one layer at a time, in each of its passes.
        """
        self.store_hashes()
        turns.begin(self.networks, device, room)

    def round_network(self, dtype: torch.dtype) -> None:
        """Store the network's weights in `dtype`, until `reload_network`."""
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            tensor.data = tensor.data.to(dtype)

    def reload_network(self, dtype: torch.dtype = torch.float32) -> None:
        """Make the network the base's again, stored in `dtype`; its parameters stay the same objects.

        Neither the host nor the device holds two networks, if `stored_weights` reads them one by one.
        """
        stored, device = self.stored_weights(), self.device
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            tensor.data = stored[name].to(device, dtype)

    def put_weights(self, state: delta.State) -> None:
        """Give the network these weights, under their names in deltas."""
        self.network.load_state_dict(delta.in_component(self.part, state))

    def is_text_map(self, name: str) -> bool:
        """Whether the weight is a linear map of the text states, which closed forms solve for; none by default."""
        return False

    def require_text_maps(self) -> None:
        """Raise an EraseError if there is no linear map of text states, which closed forms solve for."""
        if type(self).is_text_map is Family.is_text_map:
            raise EraseError(
                f"{self.family} has no maps of text states, which closed forms solve for; choose a method that trains"
            )

    def is_value_map(self, name: str) -> bool:
        """Whether the weight is one of the text maps that makes the values of cross-attention; none by default."""
        return False

    def fits_lora(self, name: str, weight: Tensor) -> bool:
        """Whether a LoRA that the usual loaders read can change the weight; none by default."""
        return False

    @classmethod
    def lora_names(cls, folder: Path, weights: Iterable[str]) -> dict[str, str]:
        """The network's layers under their names in LoRA files, those of kohya's trainer (sd-scripts); none by default.

        folder: of a pipeline. weights: names of the network's parameters.
        """
        return {}

    @classmethod
    def lora_labels(cls, folder: Path) -> dict[str, str]:
        """Entries of a LoRA's header by which other software knows the base model's architecture; none by default."""
        return {}

    def reference_names(self) -> dict[str, str]:
        """The network's weights by their names in files of the original authors' code; none by default."""
        return {}

    @abstractmethod
    def blank_inputs(self, num: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the network's `forward` for `num` square images of this side in pixels; values do not matter."""

    # --- prediction ---

    def using(self, network: Any) -> Self:
        """This model with another network of the same architecture; everything else is shared."""
        twin = copy.copy(self)
        setattr(twin, self.part, network)
        return twin

    def __call__(self, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The noise in `x`: same shape as x."""
        return self.predict(self.network, x, t, c)

    @abstractmethod
    def predict(self, network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The noise that `network` sees in `x`, whatever it was trained to predict."""

    @abstractmethod
    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at timesteps t, int64 [n], from 0 to `num_timesteps` - 1."""

    def attention(self, x: Tensor, t: Tensor, c: Conditioning) -> list[Tensor]:
        """Probabilities of every cross-attention layer, [n * heads, queries, tokens] each, with their gradients.

        Raises:
            EraseError: this architecture has no cross-attention of its own.
        """
        self.require_attention()
        raise NotImplementedError

    def require_attention(self) -> None:
        """Raise an EraseError if `attention` does not work with this architecture."""
        if type(self).attention is Family.attention:
            raise EraseError(f"{self.family} has no cross-attention layers; choose a method that needs none")

    def text_attention(self, c: Conditioning) -> Tensor:
        """Output of self-attention in the text encoder's last layer, [n, tokens, d], with its gradients.

        Raises:
            EraseError: the network that is trained is no text encoder.
        """
        self.require_text_encoder()
        raise NotImplementedError

    def require_text_encoder(self) -> None:
        """Raise an EraseError if the network that is trained is no text encoder, which `text_attention` reads."""
        if type(self).text_attention is Family.text_attention:
            raise EraseError("this method trains a text encoder; use --scope text or text-first")

    def use_attention(self, kind: str) -> None:
        """Choose attention kernels: "sdpa" is diffusers' own choice.

        Raises:
            EraseError: the kernels are not there.
        """
        if kind != "sdpa":
            raise EraseError(f"--attention {kind} is not known for {self.family}; leave it out")

    # --- images ---

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side of the model's images, in pixels."""

    @abstractmethod
    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Shape of the latent of a square image of this side in pixels: channels, height, width."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """The side of an image must be a multiple of this many pixels."""

    def require_sides(self, named: str, *sides: int) -> None:
        """Refuse images of these sides in pixels, named so in the message, if one is no multiple of `multiple`.

        Raises:
            EraseError: one is none.
        """
        if any(side < 1 or side % self.multiple for side in sides):
            raise EraseError(f"{named}; the sides that {self.name} generates are multiples of {self.multiple}")

    @abstractmethod
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, scaled for the network, on the CPU.

        images: [n, 3, h, w], in [-1, 1].
        """

    @abstractmethod
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Images in [-1, 1], [n, 3, h, w], on the CPU."""

    @abstractmethod
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        size: int | tuple[int, int],
        sampler: Sampler = "model",
        network: Any = None,
    ) -> Tensor:
        """Latents of one image for each prompt, not decoded, on the CPU.

        seeds: one for each image, of a CPU generator, so that an image is the same in any batch (up to rounding).
        guidance: diffusers' convention, 1 is none. size: of a square, or (height, width), in pixels.
        network: generate with this one in place of the model's own.

        Raises:
            EraseError: a prompt shows minors in a sexual context.
        """

    def announce(
        self, prompts: Sequence[str], seeds: Sequence[int], *, guidance: float, size: int | tuple[int, int]
    ) -> None:
        """Say what `draw` will be asked for after its next call, by the same arguments.

        A family may make noise and text states ready for it while a GPU still computes the images before; by default
        nothing is done. Images are the same with and without it.
        """

    def times(self, steps: int) -> Tensor:
        """Timesteps of `trajectory` and `draw_from`, int64, [steps], falling.

        Raises:
            EraseError: this architecture has no such trajectory.
        """
        raise EraseError(f"{self.family} cannot continue from noisy latents; choose another attack")

    def path(self, steps: int) -> Tensor:
        """What `draw_from`'s latents are made of before each step and after the last one, float32, [steps + 1, 2].

        A row is (A, B), where the latents are A times the image plus B times noise. The last row is (1, 0) by default.

        Raises:
            EraseError: see `times`.
        """
        t, one = self.times(steps), torch.ones(steps, 1, 1, 1)
        parts = [self.add_noise(image, noise, t).view(-1) for image, noise in ((one, 0 * one), (0 * one, one))]
        return torch.cat([torch.stack(parts, 1), torch.tensor([[1.0, 0.0]])])

    def draw_from(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        *,
        start: int,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """Latents of the images that noisy latents become, one for each prompt, on the CPU; a guard acts as in `draw`.

        latents: at timestep `times(steps)[start]`, [n, c, h, w]. start: how many of the steps are left out.

        Raises:
            EraseError: see `times`; or a prompt shows minors in a sexual context.
        """
        raise EraseError(f"{self.family} cannot continue from noisy latents; choose another attack")

    @abstractmethod
    def sampler(self, name: Sampler = "model") -> Any:
        """A fresh scheduler to generate with: the model's own, or DPM-Solver++ (Lu et al., 2022) for the same noise."""

    @abstractmethod
    def trajectory(
        self, x: Tensor, index: Tensor, c: Conditioning, empty: Conditioning, *, steps: int, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """Latents on the trajectory from noise to an image, and their timesteps, int64 [n].

        x: the noise. index: int64, [n], how many of `steps` steps to take; 0 leaves the noise.
        empty: one row, the unconditional branch. guidance: diffusers' convention.
        """

    # --- the rest ---

    @abstractmethod
    def release(self) -> None:
        """Free what training does not need; it is loaded again when it is next used."""

    @abstractmethod
    def hash_of(self, part: str) -> str:
        """Content hash of one of `parts`."""

    def store_hashes(self) -> None:
        """Let `hash_of` say from here on what it says now, whatever becomes of the weights."""
        self.stored_hashes = {(self.part, part): self.hash_of(part) for part in self.parts}

    @property
    def is_mini(self) -> bool:
        return self.defaults.get("family") == "mini"
