"""All knowledge of diffusers: where a Stable Diffusion comes from, its parts, and how it noises, predicts and draws."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from erase.errors import EraseError

MINI_DIR = Path(__file__).parent / "mini" / "weights"
DEFAULTS_FILE = "erase_defaults.json"  # beside model_index.json: settings that suit this model


@dataclass
class Model:
    """A Stable Diffusion, its parts as methods see them. Called with (x, t, text) it predicts the noise.

    folder: the diffusers folder that it came from; exports copy the untouched parts from there.
    defaults: settings that the folder recommends for itself.
    """

    name: str
    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin
    defaults: dict[str, Any]

    def __post_init__(self) -> None:
        noise = DDPMScheduler.from_config(self.scheduler.config)  # pyright: ignore
        self.alphas_cumprod: Tensor = noise.alphas_cumprod
        self.prediction_type: str = noise.config["prediction_type"]
        if self.prediction_type not in {"epsilon", "v_prediction"}:
            raise EraseError(f"{self.name} predicts {self.prediction_type!r}; only epsilon and v_prediction are known")

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def is_mini(self) -> bool:
        """Whether the model speaks the embedded world's language: its vocabulary says so."""
        return len(self.tokenizer) < 2000

    @property
    def vae_scale(self) -> int:
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int:
        return int(self.unet.config["sample_size"]) * self.vae_scale

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The noise in `x`: same shape as x, [n, 4, h, w]."""
        return self.predict(self.unet, x, t, text)

    def predict(self, unet: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The noise that `unet` sees in `x`; v predictions are converted: eps = sqrt(a) v + sqrt(1 - a) x."""
        output = unet(x, t, encoder_hidden_states=text).sample
        if self.prediction_type == "epsilon":
            return output
        a = self.alphas_cumprod.to(x)[t][:, None, None, None]
        return a.sqrt() * output + (1 - a).sqrt() * x

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x + sqrt(1 - a_t) eps, with diffusers' alphas_cumprod; t: int64, [n], 0 to 999."""
        a = self.alphas_cumprod.to(device=x.device, dtype=x.dtype)[t][:, None, None, None]
        return a.sqrt() * x + (1 - a).sqrt() * eps

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Text encoder states, [len(prompts), tokens, d], on the CPU."""
        length = self.tokenizer.model_max_length
        states = []
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            ids = self.tokenizer(chunk, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            states.append(self.text_encoder(ids["input_ids"].to(self.text_encoder.device)).last_hidden_state.cpu())
        return torch.cat(states)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, scaled as the UNet wants them: [n, 4, h / 8, w / 8] each.

        images: [n, 3, h, w], in [-1, 1].
        """
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist  # pyright: ignore
        factor = self.vae.config["scaling_factor"]
        return posterior.mean.cpu() * factor, posterior.std.cpu() * factor

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Pictures in [-1, 1], [n, 3, 8 h, 8 w], on the CPU."""
        factor, pictures = self.vae.config["scaling_factor"], []
        for chunk in latents.split(batch_size):
            chunk = chunk.to(self.vae.device, self.vae.dtype) / factor
            pictures.append(self.vae.decode(chunk).sample.float().clamp(-1, 1).cpu())  # pyright: ignore
        return torch.cat(pictures)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        size: int,
        unet: UNet2DConditionModel | None = None,
    ) -> Tensor:
        """Latents of one picture a prompt, without decoding: [n, 4, size / 8, size / 8], on the CPU.

        seeds: one a picture, for a CPU generator, so that a picture is the same in any batch (up to rounding).
        guidance: diffusers' convention, 1 is none.
        unet: draw with this one in the place of the model's own.
        """
        unet = unet or self.unet
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),  # pyright: ignore
            safety_checker=None,  # pyright: ignore
            feature_extractor=None,  # pyright: ignore
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        with evaluating(unet):
            return pipeline(
                list(prompts),
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="latent",
                return_dict=False,
            )[0].cpu()  # pyright: ignore

    def use_attention(self, kind: str) -> None:
        """Raises EraseError when xformers or its GPU is missing; `sdpa` is what diffusers does by itself."""
        if kind != "xformers":
            return
        try:
            self.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError) as error:
            raise EraseError("xformers is not installed; pip install 'erase-concept[xformers]'") from error
        except ValueError as error:
            raise EraseError(f"xformers cannot be used here ({error}); leave out --attention xformers") from error


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode as it was found outside."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


# --- loading --------------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    config: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> Model:
    """A Stable Diffusion in float32 from 'mini', a diffusers folder, a hub id or a single checkpoint file.

    allow_pickle: accept weights that are not safetensors (.ckpt, .bin), which can run code when loaded.
    config: a diffusers folder whose configs and tokenizer a single file is read with; without one they come from the hub.
    cache_dir: where a single file is converted to a diffusers folder, once.

    Raises:
        EraseError: not found, unreachable, broken, incomplete, or not a Stable Diffusion.
    """
    folder = locate(source, allow_pickle=allow_pickle, config=config, revision=revision, cache_dir=cache_dir)
    if not (folder / "model_index.json").is_file():
        raise EraseError(f"{folder} has no model_index.json; give the folder of a whole diffusers pipeline")
    options = _options(allow_pickle)
    try:
        unet = _load_part(UNet2DConditionModel, folder, "unet", options)
        vae = _load_part(AutoencoderKL, folder, "vae", options)
        text_encoder = _load_part(CLIPTextModel, folder, "text_encoder", options)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        scheduler = _load_scheduler(folder)
    except EraseError:
        raise
    except (
        Exception
    ) as error:  # diffusers, transformers and safetensors raise a dozen kinds here; all are the model's fault
        raise EraseError(f"cannot load {source}: {_first_line(error)}") from error
    vocabulary = text_encoder.config.vocab_size
    if len(tokenizer) != vocabulary:
        raise EraseError(
            f"{folder}/tokenizer has {len(tokenizer)} tokens but the text encoder {vocabulary}; "
            "its files are missing or broken, download the model again"
        )
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval().to(device)
    defaults_path = folder / DEFAULTS_FILE
    defaults = json.loads(defaults_path.read_text()) if defaults_path.is_file() else {}
    return Model(str(source), folder, unet, vae, text_encoder, tokenizer, scheduler, defaults)


def locate(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    config: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The local diffusers folder of a model: its own, the hub's snapshot, or a converted single file."""
    path = Path(source).expanduser()
    if str(source) == "mini":
        return MINI_DIR
    if path.is_dir():
        return path
    if path.suffix in {".safetensors", ".ckpt", ".pt", ".bin"}:
        if not path.is_file():
            raise EraseError(f"{path}: no such file")
        return _convert_single_file(path, allow_pickle, config, cache_dir)
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise EraseError(f"no model {str(source)!r}: not 'mini', not a folder, not a checkpoint file, not a hub id")
    return _download(str(source), revision, allow_pickle)


def _download(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    weights = ["*.safetensors", "*.bin"] if allow_pickle else ["*.safetensors"]
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    patterns = ["model_index.json", DEFAULTS_FILE]
    patterns += [f"{part}/{pattern}" for part in parts for pattern in ("*.json", "*.txt", *weights)]
    skip = ["*.fp16.safetensors", "*.fp16.bin", "*non_ema*"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=skip))
    except Exception as error:  # the hub client's errors share no class; each means that the model is not to be had
        raise EraseError(
            f"cannot get {repository!r} from the hub ({_first_line(error)}); "
            "check the name and the network, give a local copy with --model DIR, or try --model mini"
        ) from error


def load_unet(folder: Path, allow_pickle: bool = False) -> UNet2DConditionModel:
    """The UNet alone of a diffusers folder, in float32 on the CPU, as `load` reads it."""
    return _load_part(UNet2DConditionModel, folder, "unet", _options(allow_pickle)).requires_grad_(False).eval()


def _options(allow_pickle: bool) -> dict[str, Any]:
    return {"local_files_only": True, "low_cpu_mem_usage": True, **({} if allow_pickle else {"use_safetensors": True})}


def _load_part(cls: Any, folder: Path, part: str, options: dict[str, Any]) -> Any:
    """Load one component in float32, strictly: the libraries only warn about missing or unexpected weights."""
    if not (folder / part / "config.json").is_file():
        raise EraseError(f"{folder} has no {part}/config.json; give the folder of a whole Stable Diffusion pipeline")
    if options.get("use_safetensors") and not list((folder / part).glob("*.safetensors")):
        raise EraseError(
            f"{folder}/{part} has no safetensors weights; a pickle can run code when loaded: "
            "convert it, or pass --allow-pickle if you trust its source"
        )
    variant = _only_variant(folder / part)
    extra = {"variant": variant} if variant else {}
    loaded, info = cls.from_pretrained(folder / part, dtype=torch.float32, output_loading_info=True, **options, **extra)
    ignored = {"text_model.embeddings.position_ids", "embeddings.position_ids"}
    missing = sorted(set(info.get("missing_keys", ())) - ignored)
    surplus = sorted(set(info.get("unexpected_keys", ())) - ignored)
    mismatched = list(info.get("mismatched_keys", ()))
    on_meta = [name for name, tensor in loaded.state_dict().items() if tensor.is_meta]
    for what, names in (
        ("lacks", missing + on_meta),
        ("does not know", surplus),
        ("has a wrong shape for", mismatched),
    ):
        if names:
            raise EraseError(
                f"{folder}/{part} {what} {names[0]!r} ({len(names)} such); its weights do not fit its config"
            )
    return loaded


def _only_variant(folder: Path) -> str | None:
    """ "fp16" when a component's folder holds only files of that variant."""
    names = [path.name for path in folder.glob("*.safetensors")] or [path.name for path in folder.glob("*.bin")]
    variants = {name.split(".")[-2] for name in names if name.count(".") >= 2 and "-of-" not in name}
    return variants.pop() if len(variants) == 1 and all(name.count(".") >= 2 for name in names) else None


def _load_scheduler(folder: Path) -> SchedulerMixin:
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    class_name = index.get("scheduler", ["diffusers", None])[1]
    cls = getattr(diffusers, class_name or "", None)
    if cls is None:
        raise EraseError(f"{folder}/model_index.json names the scheduler {class_name!r}, which diffusers does not have")
    return cls.from_pretrained(folder, subfolder="scheduler")


def _convert_single_file(path: Path, allow_pickle: bool, config: str | None, cache_dir: Path | None) -> Path:
    """Convert an LDM checkpoint to a diffusers folder in the cache, keyed by its content."""
    from erase import export
    from erase.files import file_hash

    if path.suffix != ".safetensors" and not allow_pickle:
        raise EraseError(
            f"{path} is a pickle, which can run code when loaded; "
            "use a .safetensors file, or pass --allow-pickle if you trust its source"
        )
    if path.suffix == ".safetensors":
        from erase.files import open_tensors

        with open_tensors(path):  # truncated files end here, with one clear line
            pass
    folder = (cache_dir or default_cache_dir()) / "converted" / file_hash(path)[:32]
    if (folder / "model_index.json").exists():
        return folder
    options: dict[str, Any] = {"config": config, "local_files_only": True} if config else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = StableDiffusionPipeline.from_single_file(str(path), dtype=torch.float32, **options)
    except Exception as error:  # as in `load`: many libraries, one meaning
        hint = "" if config else "; offline, name a diffusers folder with its configs and tokenizer: --config DIR"
        raise EraseError(f"cannot load {path}: {_first_line(error)}{hint}") from error
    export.write_pipeline(pipeline, folder)
    return folder


def default_cache_dir() -> Path:
    """$ERASE_CACHE, else erase-concept under $XDG_CACHE_HOME or ~/.cache."""
    import os

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ERASE_CACHE") or Path(base) / "erase-concept")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
