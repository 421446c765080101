"""How the embedded model is made, from nothing but a seed: judge, VAE, UNet with text encoder, decoder, assembly.

Each stage trains on drawings that are a pure function of (seed, stage, step), saves its whole state every few hundred
steps, and continues where it stopped. Stages that do not wait for each other (judge and VAE; UNet and decoder) may run
at the same time in two processes.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erase import files, tensor_files
from erase.errors import EraseError
from erase.families import pipeline_folder
from erase.mini import judge as judging
from erase.mini import world
from erase.progress import each, progress

STAGES = ("judge", "vae", "unet", "decoder")
MAX_TOKENS = 16
SAVE_EVERY = 250  # steps between checkpoints


@dataclass(frozen=True)
class Budget:
    """Steps and batch sizes of each stage; the defaults made the weights that ship.

    unet_cycles: steps, learning rate and gamma of each cycle of the UNet's training, every one from the last one's
        average. Gamma caps the weight of low noise (min-SNR-gamma): with 5 the UNet learns shapes, with 1 it looks
        longer at high noise, where only the words can tell the colour. The first cycle alone left colours at 84 %.
        (Latents whitened over their channels made it worse: colour then shows through the noise even at the last
        timestep, and the words go unread.)
    """

    judge_steps: int = 1500
    judge_batch: int = 64
    vae_steps: int = 5000
    vae_batch: int = 8
    decoder_steps: int = 5000
    decoder_batch: int = 8
    num_latents: int = 24_000
    unet_batch: int = 32
    unet_cycles: tuple[tuple[int, float, float], ...] = ((7000, 1e-3, 5.0), (3000, 6e-4, 1.0), (1500, 4e-4, 1.0))


def train(
    output: str | Path,
    *,
    seed: int = 0,
    without: str | None = None,
    stages: tuple[str, ...] = STAGES,
    budget: Budget | None = None,
    device: str = "cpu",
    parts_from: str | Path | None = None,
    quiet: bool = False,
) -> Path:
    """Train the embedded model and assemble a diffusers pipeline folder with the judge beside it.

    output: the pipeline folder; unfinished work lives in `output/work` and is continued by the same call.
    without: an object, colour, style or "nude" that never occurs in the UNet's data: the exact gold standard for
        unlearning it. The VAE and the judge see the whole world, because they are not what is unlearned.
    parts_from: folder of a trained model whose judge and VAE are taken over, so that only UNet and text encoder train.

    Returns the pipeline folder when all stages are done, else the work folder.
    """
    budget = budget or Budget()
    output = Path(output)
    work = output / "work"
    identity = {"seed": seed, "without": without, "parts_from": parts_from and str(parts_from), **asdict(budget)}
    identity = json.loads(json.dumps(identity))
    if without is not None and without not in {*world.OBJECTS, *world.COLOURS, *world.STYLES, "nude", "clothed"}:
        raise EraseError(f"the embedded world has no '{without}'; it has {', '.join([*world.OBJECTS, *world.STYLES])}")
    if (work / "identity.json").exists() and json.loads((work / "identity.json").read_text()) != identity:
        raise EraseError(f"{work} holds another training; choose another --output or delete it")
    files.write_json(work / "identity.json", identity)
    if parts_from is not None:
        _take_parts(Path(parts_from), work)
    runs: dict[str, Callable[..., None]] = {
        "judge": _train_judge,
        "vae": _train_vae,
        "unet": _train_unet,
        "decoder": _train_decoder,
    }
    for stage in stages:
        if not (work / f"{stage}.safetensors").exists():
            runs[stage](work, seed, budget, torch.device(device), without, quiet)
    if any(not (work / f"{stage}.safetensors").exists() for stage in STAGES):
        return work
    return assemble(output)


def _take_parts(folder: Path, work: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32, local_files_only=True)
    metadata = {"scaling_factor": vae.config["scaling_factor"], "taken_from": str(folder)}
    for part in ("vae", "decoder"):
        tensor_files.write_tensors(work / f"{part}.safetensors", vae.state_dict(), metadata)
    files.copy(folder / "judge.safetensors", work / "judge.safetensors")


# --- the loop that all stages share ---------------------------------------------------------------------------------


def _fit(
    path: Path,
    modules: dict[str, nn.Module],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    ema_decay: float,
    weight_decay: float = 0.0,
    warmup: int = 50,
    quiet: bool,
) -> float:
    """Minimise `loss(step)` with AdamW, cosine schedule, clipping and an exponential moving average of the weights.

    The state goes to `path` every SAVE_EVERY steps and is read back from there. At the end the modules hold the
    average.

    Returns the seconds spent, earlier runs included.
    """
    model = nn.ModuleDict(modules)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    averages = [p.detach().clone() for p in parameters]
    start, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averages, start, seconds = state["averages"], state["step"], state["seconds"]
    clock = time.perf_counter()
    with progress(steps, path.stem, "steps", done=start, quiet=quiet) as bar:
        for step in range(start, steps):
            rate = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            optimizer.param_groups[0]["lr"] = lr * rate
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decay = min(ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
            if step % 50 == 0:
                bar.note(loss=f"{value.item():.4f}")
            if (step + 1) % SAVE_EVERY == 0:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averages": averages,
                    "step": step + 1,
                    "seconds": seconds + time.perf_counter() - clock,
                }
                files.write_pickle(path, state)
            bar.update()
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    return seconds + time.perf_counter() - clock


def _rng(seed: int, stage: str, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, STAGES.index(stage), step])


def _drawings(rng: np.random.Generator, num: int, without: str | None = None) -> tuple[list[world.Scene], Tensor]:
    scenes = [world.sample_scene(rng, without) for _ in range(num)]
    return scenes, judging.to_tensor(world.draw(scene, rng) for scene in scenes)


# --- judge ----------------------------------------------------------------------------------------------------------


def _train_judge(work: Path, seed: int, budget: Budget, device: torch.device, without: str | None, quiet: bool) -> None:
    torch.manual_seed(seed)
    judge = judging.Judge().to(device)

    def loss(step: int) -> Tensor:
        pictures, labels = judging.examples(_rng(seed, "judge", step), budget.judge_batch)
        logits = judge(pictures.to(device))
        return torch.stack([F.cross_entropy(logits[head], labels[head].to(device)) for head in labels]).sum()

    path = work / "judge.pt"
    seconds = _fit(path, {"judge": judge}, loss, steps=budget.judge_steps, lr=2e-3, ema_decay=0.98, quiet=quiet)
    judge.eval()
    rng = np.random.default_rng([seed, 99])
    scenes = [world.sample_scene(rng) for _ in range(2000)]
    answers = judging.name(judge.cpu(), [world.draw(scene, rng) for scene in scenes])
    truth = [{"object": s.object, "colour": s.colour or judging.NONE, "style": s.style or judging.NONE} for s in scenes]
    accuracy: dict[str, float] = {
        head: sum(a[head] == t[head] for a, t in zip(answers, truth, strict=True)) / len(truth)
        for head in judging.HEADS
    }
    metadata = {"accuracy": {**accuracy, "num_drawings": len(truth)}, "seed": seed, "seconds": seconds}
    tensor_files.write_tensors(work / "judge.safetensors", judge.state_dict(), metadata)
    path.unlink(missing_ok=True)


# --- VAE ------------------------------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    """A VAE with f = 8 and 4 latent channels whose residual branches begin at zero: it learns colours at once."""
    shape: dict[str, Any] = dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=world.SIZE,
    )
    vae = AutoencoderKL(**shape)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if name.endswith(("conv2", "to_out.0")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return vae


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + chroma + edges: greys are the easy local optimum at this scale, chroma terms lead out of it."""
    error = output - target
    chroma = (error[:, 0] - error[:, 1]).abs().mean() + (error[:, 2] - error[:, 1]).abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.3 * chroma + 0.5 * edges


def _train_vae(work: Path, seed: int, budget: Budget, device: torch.device, without: str | None, quiet: bool) -> None:
    torch.manual_seed(seed)
    vae: Any = make_vae()
    vae.to(device)

    def loss(step: int) -> Tensor:
        rng = _rng(seed, "vae", step)
        _, pictures = _drawings(rng, (budget.vae_batch + 1) // 2)
        crops = []
        for picture in pictures:  # two crops of each drawing: drawing costs more than cutting
            for _ in range(2):
                y, x = rng.integers(4, 29, 2)
                crops.append(picture[:, y : y + 32, x : x + 32])
        target = torch.stack(crops).to(device)
        posterior = vae.encode(target).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32)).to(device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / target[0].numel()
        return reconstruction_loss(output, target) + 3e-3 * kl

    path = work / "vae.pt"
    seconds = _fit(path, {"vae": vae}, loss, steps=budget.vae_steps, lr=2e-3, ema_decay=0.99, quiet=quiet)
    vae.eval().requires_grad_(False)
    _, pictures = _drawings(np.random.default_rng([seed, 98]), 256)
    with torch.no_grad():
        latents = vae.encode(pictures.to(device)).latent_dist.mean
    metadata = {"seconds": seconds, "scaling_factor": 1 / latents.std().item()}
    tensor_files.write_tensors(work / "vae.safetensors", vae.state_dict(), metadata)
    path.unlink(missing_ok=True)


def _load_vae(work: Path, name: str = "vae") -> AutoencoderKL:
    if not (work / "vae.safetensors").exists():
        raise EraseError(f"{work} has no trained VAE yet; run the stage 'vae' first")
    vae = make_vae()
    vae.load_state_dict(tensor_files.read_tensors(work / f"{name}.safetensors"))
    vae.register_to_config(scaling_factor=tensor_files.read_metadata(work / "vae.safetensors")["scaling_factor"])
    return vae.eval().requires_grad_(False)


def _train_decoder(
    work: Path, seed: int, budget: Budget, device: torch.device, without: str | None, quiet: bool
) -> None:
    """The encoder is frozen from here on, so that latents stay what they are while the decoder sharpens."""
    vae: Any = _load_vae(work)
    vae.to(device)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def loss(step: int) -> Tensor:
        rng = _rng(seed, "decoder", step)
        _, pictures = _drawings(rng, budget.decoder_batch)
        target = pictures.to(device)
        with torch.no_grad():
            latents = vae.encode(target).latent_dist.mean
            jitter = rng.standard_normal(latents.shape, dtype=np.float32)
            latents = latents + 0.03 / vae.config["scaling_factor"] * torch.from_numpy(jitter).to(device)
        return reconstruction_loss(vae.decode(latents).sample, target)

    path = work / "decoder.pt"
    steps = budget.decoder_steps
    seconds = _fit(path, {"vae": vae}, loss, steps=steps, lr=1.5e-3, ema_decay=0.995, quiet=quiet)
    _, pictures = _drawings(np.random.default_rng([seed, 97]), 256)
    with torch.no_grad():
        latents = vae.eval().encode(pictures.to(device)).latent_dist.mean
        mse = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), pictures.to(device)).item()
    metadata = {"seconds": seconds, "psnr": 10 * math.log10(4 / mse)}
    tensor_files.write_tensors(work / "decoder.safetensors", vae.state_dict(), metadata)
    path.unlink(missing_ok=True)


# --- UNet and text encoder ------------------------------------------------------------------------------------------


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE in which each word of the world is one token; any other text falls back to bytes."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: Any = _learn_merges(world.WORDS)
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token, the most frequent pair first, the first in the alphabet of these.

    The `tokenizers` library's trainer breaks such ties differently from process to process, and then a word's number,
    and with it the text encoder, would not be the same tomorrow.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for tokens in split for pair in pairwise(tokens)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for tokens in split:
            for i in reversed(range(len(tokens) - 1)):
                if tuple(tokens[i : i + 2]) == best:
                    tokens[i : i + 2] = ["".join(best)]
    return merges


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    special: Any = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    start, end = special
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """The block types of SD v1.4 in small: two cross-attention levels and a plain one, 8x8 latents."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads, as in SD v1.4's own config
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """SD v1.4's betas; `clip_sample` must be off, or latents beyond [-1, 1] are cut and colours drift."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")[
        "input_ids"
    ]  # pyright: ignore[reportReturnType]


def _load_unet(work: Path) -> dict[str, Any]:
    modules: dict[str, Any] = {"unet": make_unet(), "text_encoder": make_text_encoder(make_tokenizer())}
    nn.ModuleDict(modules).load_state_dict(tensor_files.read_tensors(work / "unet.safetensors"))
    return modules


def _train_unet(work: Path, seed: int, budget: Budget, device: torch.device, without: str | None, quiet: bool) -> None:
    """Epsilon prediction with min-SNR weights on cached latents; captions are drawn anew at every step."""
    vae: Any = _load_vae(work)
    vae.to(device)
    scenes, batches, size = [], [], 100
    for index in each(range(math.ceil(budget.num_latents / size)), "latents", "batches", quiet=quiet):
        drawn, pictures = _drawings(np.random.default_rng([seed, 50, index]), size, without)
        scenes += drawn
        with torch.no_grad():
            batches.append(vae.encode(pictures.to(device)).latent_dist.mean * vae.config["scaling_factor"])
    latents = torch.cat(batches)

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text_encoder: Any = make_text_encoder(tokenizer)
    unet: Any = make_unet()
    text_encoder.to(device)
    unet.to(device)
    alphas = make_scheduler().alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    num, modules, done, seconds = budget.unet_batch, {"unet": unet, "text_encoder": text_encoder}, 0, 0.0

    def loss(step: int, gamma: float) -> Tensor:
        rng = _rng(seed, "unet", step)
        chosen = rng.integers(len(scenes), size=num)
        prompts = ["" if rng.random() < 0.1 else world.caption(scenes[index], rng) for index in chosen]
        x = latents[torch.from_numpy(chosen).to(device)]
        eps = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(device)
        t = torch.from_numpy(((np.arange(num) + rng.random(num)) / num * 1000).astype(np.int64)).to(device)
        a = alphas[t][:, None, None, None]
        text = text_encoder(tokenize(tokenizer, prompts).to(device)).last_hidden_state
        predicted = unet(a.sqrt() * x + (1 - a).sqrt() * eps, t, text).sample
        weight = snr[t].clamp(max=gamma) / snr[t]
        return (weight * (predicted - eps).square().mean((1, 2, 3))).mean()

    for cycle, (steps, lr, gamma) in enumerate(budget.unet_cycles, start=1):
        finished = work / f"unet-{cycle}.safetensors"
        if finished.exists():
            nn.ModuleDict(modules).load_state_dict(tensor_files.read_tensors(finished))
            seconds += tensor_files.read_metadata(finished)["seconds"]
        else:
            path, first = work / f"unet-{cycle}.pt", done
            spent = _fit(
                path,
                modules,
                lambda step, first=first, gamma=gamma: loss(first + step, gamma),
                steps=steps,
                lr=lr,
                ema_decay=0.998,
                weight_decay=1e-3,
                warmup=100,
                quiet=quiet,
            )
            tensor_files.write_tensors(finished, nn.ModuleDict(modules).state_dict(), {"seconds": spent})
            path.unlink(missing_ok=True)
            seconds += spent
        done += steps
    metadata = {"seconds": seconds, "samples": done * num}
    tensor_files.write_tensors(work / "unet.safetensors", nn.ModuleDict(modules).state_dict(), metadata)


# --- assembly -------------------------------------------------------------------------------------------------------


def assemble(output: str | Path) -> Path:
    """Write the trained parts as an fp16 diffusers pipeline folder, with the judge and erasure defaults beside it."""
    output = Path(output)
    work = output / "work"
    tokenizer, modules = make_tokenizer(), _load_unet(work)
    pipeline = StableDiffusionPipeline(
        vae=_load_vae(work, "decoder"),
        **modules,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.text_encoder.float()  # stock diffusers loads its own parts in float32, transformers as they are stored
    pipeline_folder.write_pipeline(pipeline, output)
    files.copy(work / "judge.safetensors", output / "judge.safetensors")
    files.write_json(output / "erase_defaults.json", DEFAULTS)
    recipe: dict[str, Any] = {
        "identity": json.loads((work / "identity.json").read_text()),
        "stages": {stage: tensor_files.read_metadata(work / f"{stage}.safetensors") for stage in STAGES},
        "torch": str(torch.__version__),
        "num_threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    files.write_json(output / "training.json", recipe)
    return output


# What suits a model of this size where SD v1.4's values do not; `erase-concept` reads it from the model folder.
DEFAULTS: dict[str, Any] = {
    "family": "mini",
    "guidance_scale": 2.0,
    "num_inference_steps": 25,
    "learning_rate": 5e-4,
    "batch_size": 16,
    "num_forget": 96,
    "num_retain": 192,
    "generation_batch_size": 32,
    "num_train_steps": 100,
    # for closed forms the word alone is too little here: the end tokens say it again, and the UNet listens to them
    "methods": {
        "uce": {"set": ["tokens=tail", "retain_tokens=all"]},
        "rece": {"set": ["lamb_1=1", "epochs=1"]},
        "speed": {"set": ["tokens=tail", "retain_tokens=tail", "rho=0.05", "filter=false"]},
        "ga": {"learning_rate": 1e-4, "num_train_steps": 30, "set": ["alpha=1"]},
        "esd-x": {"learning_rate": 0.0004},
        "esd-strict": {"learning_rate": 0.0004},
        "leco": {"learning_rate": 0.002},
        "esd-u": {"learning_rate": 0.0002},
        "esd-full": {"learning_rate": 0.0002},
        "fmn": {"learning_rate": 5e-05, "num_train_steps": 35, "batch_size": 8},
        "ca": {"learning_rate": 0.0005},
        "sdd": {"learning_rate": 0.001, "batch_size": 4, "set": ["teacher_decay=0.98"]},
        "erasediff": {"learning_rate": 0.0002},
        "scissorhands": {"learning_rate": 0.0005, "num_train_steps": 300, "set": ["sparsity=0.9999"]},
    },
}
