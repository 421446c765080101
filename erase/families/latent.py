"""What families of latent diffusion share: the VAE's passes, and parts that are freed and loaded again."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from erase.delta import State, content_hash, of_component
from erase.device import dtype_of, place_of, rounded, staged
from erase.errors import EraseError
from erase.families import components, pipeline_folder, turns
from erase.families.protocol import Family
from erase.families.vocabulary import tokenizer_hash


class LatentFamily(Family):
    """A family whose networks see the latents of a VAE. Each of `parts` is an attribute under its name.

    loaded_again: class of each part that `release` frees. vae_scale: pixels a latent pixel, in each direction.
    weights_file: weights that replaced the folder's in the network; see `erase.families.unet_file`.
    """

    loaded_again: ClassVar[Mapping[str, Any]] = {}

    vae: AutoencoderKL
    vae_scale: int
    allow_pickle: bool
    weights_file: str | None

    # --- parts ---

    @property
    def network(self) -> Any:
        return getattr(self, self.part)

    def stored_weights(self) -> State:
        """Read one by one from the folder's safetensors files, if the network has all its weights from there."""
        found = None if self.weights_file else pipeline_folder.stored_weights(self.folder / self.part)
        return super().stored_weights() if found is None or found.keys() != self.network.state_dict().keys() else found

    @property
    def networks(self) -> list[torch.nn.Module]:
        return list(dict.fromkeys([*super().networks, *(getattr(self, part) for part in self.loaded_again)]))

    def release(self) -> None:
        """Free the parts in `loaded_again`; each is loaded again when it is next used."""
        if self.takes_turns:
            where = self.device
            turns.end(self.networks)
            self.stored_hashes = {}
            self.network.to(where)
            cast(Any, self.denoiser).to(where)
        for part in self.loaded_again.keys() & vars(self).keys():
            delattr(self, part)

    def __getattr__(self, name: str) -> Any:
        """A part that was released (Python asks here for what is not there)."""
        if name not in type(self).loaded_again:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        folder = self.folder / name
        part = components.load(self.loaded_again[name], folder, allow_pickle=self.allow_pickle).to(self.device)
        setattr(self, name, part)
        return part

    def hash_of(self, part: str) -> str:
        """The network's is the one that deltas and run.json state, whatever the precision."""
        if (self.part, part) in self.stored_hashes:
            return self.stored_hashes[self.part, part]
        if part.startswith("tokenizer"):
            return tokenizer_hash(getattr(self, part))
        state = getattr(self, part).state_dict()
        return content_hash(of_component(part, state) if part == self.part else state)

    def _staged(self, tensor: Tensor) -> Tensor:
        return staged(tensor, self.device)

    # --- images ---

    @property
    def multiple(self) -> int:
        return max(8, self.vae_scale)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        config: Any = self.denoiser.config
        return int(config["in_channels"]), size // self.vae_scale, size // self.vae_scale

    @property
    def resolution(self) -> int:
        return int(self.denoiser.config["sample_size"]) * self.vae_scale

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, scaled as the network wants them, [n, c, h, w] each.

        images: [n, 3, h * vae_scale, w * vae_scale], in [-1, 1].
        """

        def encode() -> Tensor:
            posterior = self.vae.encode(images.to(place_of(self.vae), dtype_of(self.vae))).latent_dist  # pyright: ignore
            return torch.stack([posterior.mean, posterior.std]).float().cpu()

        mean, std = self._by_vae(encode)
        factor, (shift, unit) = self.vae.config["scaling_factor"], self._latent_moments()
        return (mean - shift) * factor / unit, std * factor / unit

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Images in [-1, 1], [n, 3, h * vae_scale, w * vae_scale], on the CPU."""
        factor, images = self.vae.config["scaling_factor"], []
        shift, unit = (moment.to(place_of(self.vae)) for moment in self._latent_moments())
        for chunk in latents.split(batch_size):

            def decode(chunk: Tensor = chunk) -> Tensor:
                z = chunk.to(place_of(self.vae), dtype_of(self.vae)) / factor
                return self.vae.decode(z * unit.to(z) + shift.to(z)).sample.float()  # pyright: ignore

            images.append(self._by_vae(decode).clamp(-1, 1).cpu())
        return torch.cat(images)

    def _by_vae(self, compute: Callable[[], Tensor]) -> Tensor:
        """What the VAE computes in its precision; once more in float32 where half precision overflows.

        Raises:
            EraseError: it is not finite in float32 either.
        """
        with rounded(self.vae_precision, self.vae):
            found = compute()
        if self.vae_precision != "fp32" and not found.isfinite().all():
            found = compute()
        if not found.isfinite().all():
            raise EraseError(f"the VAE of {self.name} computes values that are not finite (NaN or infinity)")
        return found

    @property
    def vae_precision(self) -> str:
        """Of the VAE's passes, before any upcast of `_by_vae`."""
        return self.precision

    def _latent_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that a VAE's config states for its latents, [1, channels or 1, 1, 1]; else 0, 1.

        Stable Diffusion 3 states its mean as `shift_factor`.
        """
        config = self.vae.config
        mean, std = config["latents_mean"], config["latents_std"]
        if mean is None or std is None:
            return torch.full((1, 1, 1, 1), config["shift_factor"] or 0.0), torch.ones(1, 1, 1, 1)
        return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
