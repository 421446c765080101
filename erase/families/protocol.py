"""What the other rooms may ask of a model, whatever its architecture."""
# pyright: strict, reportPrivateImportUsage=false

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from erase.conditioning import Conditioning
from erase.errors import EraseError
from erase.guards import Guard

Sampler = Literal["model", "dpm++"]


class Family(ABC):
    """One loaded model of one architecture. A family is a subclass in a file of its own, named in families/registry.py.

    Called with (x, t, c) it predicts the noise in the latents x, [n, c, h, w], at timesteps t, int64 [n], under the
    conditioning c. `methods` see nothing else of it; `training` updates `network`; `data` asks for latents and text
    states; `export` copies the untouched parts from `folder`.

    Every optional part is declared here with its default.

    family: the name of the architecture. pipelines: class names in model_index.json that it loads.
    part: the subfolder of the network that is trained, and the prefix of its weights' names in deltas.
    parts: all subfolders that decide an image. data_parts: those that make latents and text states.
    num_timesteps: of the training schedule. scopes: by name, which weights may be trained at all; see `scope`.

    folder: the diffusers folder that it came from.
    defaults: what the folder's erase_defaults.json says, and "family": "mini" for the embedded model's world.
    guard: an inference-time guard that acts whenever the model generates.
    notes: lines that the user should see about how the model was loaded.
    precision: of UNet and VAE in passes without gradients; their outputs are float32.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    part: ClassVar[str] = "unet"
    parts: ClassVar[tuple[str, ...]]
    data_parts: ClassVar[tuple[str, ...]]
    num_timesteps: ClassVar[int] = 1000
    scopes: ClassVar[Mapping[str, Callable[[str], bool]]]

    name: str
    folder: Path
    defaults: dict[str, Any]
    guard: Guard | None
    notes: tuple[str, ...]
    precision: str

    # --- the network that is trained ---

    @property
    @abstractmethod
    def network(self) -> ModelMixin:
        """The network that is trained."""

    @abstractmethod
    def stored_network(self) -> ModelMixin:
        """The base's network once more, read from the folder, in float32 on the CPU."""

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def round_network(self, dtype: torch.dtype) -> None:
        """Store the network's weights in `dtype`, until `reload_network`."""
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            tensor.data = tensor.data.to(dtype)

    def reload_network(self) -> None:
        """Make the network the base's again, in float32; its parameters stay the same objects."""
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            tensor.data = tensor.new_empty(0)  # first free, then load
        self.put_network(self.stored_network())

    def put_network(self, base: nn.Module) -> None:
        """Give the network the weights of `base`; its parameters stay the same objects, on the same device."""
        device, stored = self.device, {**dict(base.named_parameters()), **dict(base.named_buffers())}
        for name, tensor in (*self.network.named_parameters(), *self.network.named_buffers()):
            tensor.data = stored[name].data.to(device)

    def is_text_map(self, name: str) -> bool:
        """Whether the weight is a linear map of the text states, which closed forms solve for; none by default."""
        return False

    # --- prediction ---

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
        raise EraseError(f"{self.family} has no cross-attention layers; choose a method that needs none")

    def use_attention(self, kind: str) -> None:
        """Choose attention kernels: "sdpa" is diffusers' own choice.

        Raises:
            EraseError: the kernels are not there.
        """
        if kind != "sdpa":
            raise EraseError(f"--attention {kind} is not known for {self.family}; leave it out")

    # --- text ---

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Tokens that the text encoder reads, start and end included: the length of its states."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, one row each, on the CPU.

        Raises:
            EraseError: a prompt shows minors in a sexual context.
        """

    def unconditional(self) -> Conditioning:
        """The single row that guidance starts from: by default that of the empty prompt."""
        return self.encode_text([""])

    @abstractmethod
    def tokens(self, prompt: str) -> list[int]:
        """Numbers of the prompt's tokens between start and end, as far as the text encoder reads them."""

    @abstractmethod
    def all_tokens(self, prompt: str) -> list[int]:
        """As `tokens`, with those behind the text encoder's limit, which it never sees."""

    def truncates(self, prompt: str) -> bool:
        """Whether the prompt is longer than the text encoder reads."""
        return len(self.all_tokens(prompt)) > self.max_tokens - 2

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

    @property
    def is_mini(self) -> bool:
        return self.defaults.get("family") == "mini"
