"""Laws of what leaves: stock diffusers opens it, it predicts what the model in memory did, nothing else changed."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from erase.delta import content_hash
from erase.errors import EraseError
from erase.export.pipeline import save_pipeline
from erase.export.single_file import save_single_file
from erase.families.layers import block_of
from erase.families.pipeline_folder import write_pipeline

SD14: dict[str, Any] = dict(sample_size=64, cross_attention_dim=768)  # on top of the defaults of UNet2DConditionModel
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def read_unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / UNET_FILE)


def edit(state: dict[str, torch.Tensor], only: str = "", size: float = 0.05) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    noise = {name: size * torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}
    return {name: tensor + noise[name] if only in name else tensor.clone() for name, tensor in state.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PREDICT = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
x, text = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(pipeline.unet(x, 500, text).sample, sys.argv[3])
assert not any(name.split(".")[0] == "erase" for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.ci
def test_stock_diffusers_in_a_fresh_process_predicts_exactly_what_the_model_in_memory_predicts(
    tiny_pipeline_dir, tmp_path
):
    base = read_unet(tiny_pipeline_dir)
    assert len(base) == 686  # those of the real one
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_dir, subfolder="unet")
    draw = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, 16, generator=draw)
    with torch.no_grad():
        before = unet(x, 500, text).sample
        unet.load_state_dict(edit(base))
        expected = unet(x, 500, text).sample
    save_pipeline(tiny_pipeline_dir, tmp_path / "out", unet.state_dict())
    torch.save((x, text), tmp_path / "inputs.pt")
    program = [sys.executable, "-c", PREDICT, str(tmp_path / "out"), str(tmp_path / "inputs.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another count, other roundings
    subprocess.run([*program, str(tmp_path / "answer.pt")], check=True, cwd=tmp_path, env=environment)
    answer = torch.load(tmp_path / "answer.pt", weights_only=True)
    assert torch.equal(answer, expected)
    assert not torch.equal(answer, before)


def test_everything_but_the_unet_weights_is_the_base_byte_for_byte(tiny_pipeline_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline_dir, base)
    (base / "erase_defaults.json").write_text("{}")
    (base / "delta.safetensors").write_text("of another run")
    (base / "v1-5-pruned.ckpt").write_text("not a component")
    (base / "samples").mkdir()
    (base / "samples" / "0.png").write_text("of another run")
    for stale in ("model.fp16.safetensors", "model.bin", "model.safetensors.index.json", "flax_model.msgpack"):
        (base / "unet" / f"diffusion_pytorch_{stale}").write_text("the base's weights")
    new = edit(read_unet(base))
    save_pipeline(base, tmp_path / "out", new)
    before, after = contents(base), contents(tmp_path / "out")
    strays = {"delta.safetensors", "v1-5-pruned.ckpt", "samples/0.png"}
    assert before.keys() - after.keys() == strays | {name for name in before if "unet/diffusion_pytorch" in name} - {
        UNET_FILE
    }
    assert {name for name in after if after[name] != before[name]} == {UNET_FILE}
    assert "unet/config.json" in after and "tokenizer/tokenizer.json" in after and "erase_defaults.json" in after
    assert content_hash(read_unet(tmp_path / "out")) == content_hash(new)


def test_the_same_weights_give_the_same_bytes_and_the_umask_decides_who_reads_them(tiny_pipeline_dir, tmp_path):
    new = edit(read_unet(tiny_pipeline_dir))
    save_pipeline(tiny_pipeline_dir, tmp_path / "a", new)
    previous = os.umask(0o027)
    try:
        save_pipeline(tiny_pipeline_dir, tmp_path / "b", dict(reversed(new.items())))
    finally:
        os.umask(previous)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    save_pipeline(tiny_pipeline_dir, tmp_path / "c", edit(new))  # control
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_hub_snapshot_of_symlinks_is_copied_by_content(tiny_pipeline_dir, tmp_path):
    for path in [path for path in tiny_pipeline_dir.rglob("*") if path.is_file()]:
        link = tmp_path / "snapshot" / path.relative_to(tiny_pipeline_dir)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    save_pipeline(tmp_path / "snapshot", tmp_path / "out", read_unet(tiny_pipeline_dir))
    assert contents(tmp_path / "out") == contents(tiny_pipeline_dir)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_base_with_variant_files_only_opens_without_naming_the_variant(tiny_pipeline_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline_dir, base)
    for folder, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (base / folder / f"{stem}.safetensors").rename(base / folder / f"{stem}.fp16.safetensors")
    new = edit(read_unet(tiny_pipeline_dir))
    with pytest.raises(OSError, match="no file named"):
        StableDiffusionPipeline.from_pretrained(base)
    save_pipeline(base, tmp_path / "out", new)
    assert content_hash(StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet.state_dict()) == content_hash(
        new
    )
    assert not list((tmp_path / "out").rglob("*.fp16.*"))

    # its single file holds what that of the plain files does
    save_single_file(tmp_path / "variant.safetensors", base, weights=new)
    save_single_file(tmp_path / "plain.safetensors", tiny_pipeline_dir, weights=new)
    assert (tmp_path / "variant.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()

    pickled = (
        tmp_path / "out" / "vae" / "diffusion_pytorch_model.bin"
    )  # a plain file is there: variants stay as they are
    torch.save(load_file(base / "vae" / "diffusion_pytorch_model.fp16.safetensors"), pickled)
    shutil.copy(pickled, base / "vae")
    save_pipeline(base, tmp_path / "again", new)
    assert {path.name for path in (tmp_path / "again" / "vae").iterdir()} == {
        path.name for path in (base / "vae").iterdir()
    }


def test_an_older_result_in_the_folder_leaves_no_weights_behind(tiny_pipeline_dir, tmp_path):
    new = edit(read_unet(tiny_pipeline_dir))
    for name in (UNET_FILE.replace("_model", "_model.fp16"), "text_encoder/pytorch_model.bin"):
        (tmp_path / "output" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "output" / name).write_text("stale")
    base, output = tmp_path / "base", tmp_path / "output"
    shutil.copytree(tiny_pipeline_dir, base)
    (base / "erase_defaults.json").write_text("{}")
    for name in ("README.md", "delta.safetensors"):
        (output / name).write_text("of this run")
    save_pipeline(base, output, new)
    assert contents(output).keys() == contents(base).keys() | {"README.md", "delta.safetensors"}


def test_a_copy_that_breaks_off_leaves_no_folder_that_opens(tiny_pipeline_dir, tmp_path, monkeypatch):
    save_pipeline(tiny_pipeline_dir, tmp_path, read_unet(tiny_pipeline_dir))
    assert (tmp_path / "model_index.json").exists()  # control

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(EraseError, match="No space left on device"):
        save_pipeline(tiny_pipeline_dir, tmp_path, edit(read_unet(tiny_pipeline_dir)))
    assert not (tmp_path / "model_index.json").exists()
    assert not list(tmp_path.rglob(".*"))


def test_a_folder_that_cannot_be_published_is_refused(tiny_pipeline_dir, tmp_path):
    state = read_unet(tiny_pipeline_dir)
    with pytest.raises(EraseError, match="no model_index.json"):
        save_pipeline(tmp_path, tmp_path / "out", state)
    with pytest.raises(EraseError, match="is the base model itself"):
        save_pipeline(tiny_pipeline_dir, tiny_pipeline_dir / ".." / tiny_pipeline_dir.name, state)
    with pytest.raises(EraseError, match="'conv_in.bias' is missing here but in the UNet of"):
        save_pipeline(tiny_pipeline_dir, tmp_path / "out", {n: t for n, t in state.items() if n != "conv_in.bias"})
    with pytest.raises(EraseError, match="'unet.conv_in.bias' is here but not in the UNet of"):
        save_pipeline(tiny_pipeline_dir, tmp_path / "out", state | {"unet.conv_in.bias": torch.zeros(4)})
    with pytest.raises(EraseError, match="'conv_in.bias' has 5 weights here but 4 in the UNet of"):
        save_pipeline(tiny_pipeline_dir, tmp_path / "out", state | {"conv_in.bias": torch.zeros(5)})
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline_dir, base)
    shutil.rmtree(base / "vae")
    with pytest.raises(EraseError, match="no folder 'vae'"):
        save_pipeline(base, tmp_path / "out", state)
    (base / "model_index.json").write_text('{"../out": ["diffusers", "X"], "transformer": ["diffusers", "X"]}')
    with pytest.raises(EraseError, match="names no unet"):
        save_pipeline(base, tmp_path / "out", state)
    assert not (tmp_path / "out").exists()


def test_dtype_casts_the_weights_that_are_written(tiny_pipeline_dir, tmp_path):
    state = edit(read_unet(tiny_pipeline_dir))
    save_pipeline(tiny_pipeline_dir, tmp_path, state, dtype=torch.float16)
    expected = {name: tensor.half() for name, tensor in state.items()}
    assert content_hash(read_unet(tmp_path)) == content_hash(expected)


def test_blocks_group_every_weight_for_reading():
    with torch.device("meta"):
        names = UNet2DConditionModel(**SD14).state_dict()
    blocks = {block_of(name) for name in names}
    parts = {"attn1", "attn2", "ff", "proj", "resnet"}
    with_attention = [f"down_blocks.{n}" for n in range(3)] + ["mid_block"] + [f"up_blocks.{n}" for n in (1, 2, 3)]
    expected = {f"{block} {part}" for block in with_attention for part in parts}
    expected |= {"down_blocks.3 resnet", "up_blocks.0 resnet", "conv_in", "conv_out", "time_embedding"}
    expected |= {f"down_blocks.{n} sampler" for n in range(3)} | {f"up_blocks.{n} sampler" for n in range(3)}
    assert blocks == expected
    assert block_of("unet.down_blocks.1.attentions.0.transformer_blocks.0.norm2.weight") == "down_blocks.1 attn2"
    assert block_of("text_encoder.encoder.layers.0.mlp.fc1.weight") == "text_encoder"


def state_of(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_single_file_comes_back_bit_for_bit(dtype, tiny_pipeline_dir, tmp_path):
    path = tmp_path / "model.safetensors"
    save_single_file(path, tiny_pipeline_dir, dtype=dtype)
    number = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    loaded = StableDiffusionPipeline.from_single_file(
        path, config=str(tiny_pipeline_dir), local_files_only=True, dtype=number
    )
    base = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    assert content_hash(state_of(loaded)) == content_hash({n: t.to(number) for n, t in state_of(base).items()})
    names = load_file(path).keys()
    assert {name.split(".")[0] for name in names} == {"model", "first_stage_model", "cond_stage_model"}
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in names
    assert all(tensor.dtype == number for tensor in load_file(path).values())
    first = path.read_bytes()
    save_single_file(path, tiny_pipeline_dir, dtype=dtype)
    assert path.read_bytes() == first


def test_older_file_layouts_give_the_same_single_file(tiny_pipeline_dir, tmp_path):
    """Files of 2022: `text_model.` with position ids in the text encoder, query/key/value in the VAE, pickles."""
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline_dir, base)
    text = load_file(base / "text_encoder" / "model.safetensors")
    assert not any(name.startswith("text_model.") for name in text)  # control: the tiny pipeline has the flat layout
    old = {f"text_model.{name}": tensor for name, tensor in text.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, base / "text_encoder" / "model.safetensors")
    vae_file = base / "vae" / "diffusion_pytorch_model.safetensors"
    vae = load_file(vae_file)
    vae_file.unlink()
    for new_word, old_word in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        vae = {name.replace(f".{new_word}.", f".{old_word}."): tensor for name, tensor in vae.items()}
    torch.save(vae, vae_file.with_suffix(".bin"))
    save_single_file(tmp_path / "new.safetensors", tiny_pipeline_dir, dtype="fp32")
    save_single_file(tmp_path / "old.safetensors", base, dtype="fp32")
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "old.safetensors").read_bytes()


def test_a_pipeline_of_another_kind_has_no_single_file(tiny_pipeline_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline_dir, base)
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(EraseError, match="vae has no weights"):
        save_single_file(tmp_path / "x.safetensors", base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(EraseError, match="a second text encoder that is not a StableDiffusionXLPipeline"):
        save_single_file(tmp_path / "x.safetensors", base)
    assert not (tmp_path / "x.safetensors").exists()


def same_pipeline(a: Path, b: Path) -> bool:
    return content_hash(state_of(StableDiffusionPipeline.from_pretrained(a))) == content_hash(
        state_of(StableDiffusionPipeline.from_pretrained(b))
    )


def test_a_pipeline_in_memory_becomes_a_folder_that_older_libraries_read(tiny_pipeline_dir, tmp_path):
    """transformers 4 knows the text encoder's weights by `text_model.` and the tokenizer by vocab.json, merges.txt."""
    flat = load_file(tiny_pipeline_dir / "text_encoder" / "model.safetensors")
    assert not any(name.startswith("text_model.") for name in flat)  # control: what save_pretrained writes
    assert not (tiny_pipeline_dir / "tokenizer" / "vocab.json").exists()
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    folder = tmp_path / "new" / "folder"
    previous = os.umask(0o027)
    try:
        write_pipeline(pipeline, folder)
    finally:
        os.umask(previous)
    written = load_file(folder / "text_encoder" / "model.safetensors")
    assert {name.removeprefix("text_model."): tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in flat.items()
    }
    assert all(name.startswith("text_model.") for name in written)
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    assert vocabulary == pipeline.tokenizer.get_vocab()
    assert (folder / "tokenizer" / "merges.txt").is_file()
    assert same_pipeline(folder, tiny_pipeline_dir)
    assert StableDiffusionPipeline.from_pretrained(folder).tokenizer("a circle") == pipeline.tokenizer("a circle")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o640}
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_a_written_pipeline_takes_the_place_of_an_older_one_and_leaves_other_files(tiny_pipeline_dir, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_text("stale")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_text("stale")
    (tmp_path / "judge.safetensors").write_text("not of the pipeline")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    write_pipeline(pipeline, tmp_path)
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.bin").exists()
    assert (tmp_path / "judge.safetensors").exists()
    assert same_pipeline(tmp_path, tiny_pipeline_dir)
    first = contents(tmp_path)
    write_pipeline(pipeline, tmp_path)
    assert contents(tmp_path) == first


def test_a_pipeline_that_cannot_be_written_leaves_no_folder_that_opens(tiny_pipeline_dir, tmp_path, monkeypatch):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    write_pipeline(pipeline, tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").exists()  # control
    replace = os.replace

    def full(source, target):
        if "unet" in str(source):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EraseError, match="cannot write .*No space left on device"):
        write_pipeline(pipeline, tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert not list(tmp_path.rglob(".*"))


def test_a_safety_checker_is_written_as_older_libraries_read_it(tiny_pipeline_dir, tmp_path):
    part = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision = part | dict(image_size=8, patch_size=4)
    config = CLIPConfig(text_config=part | dict(vocab_size=9), vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_pipeline_dir, safety_checker=checker, feature_extractor=CLIPImageProcessor(), requires_safety_checker=True
    )
    write_pipeline(pipeline, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["feature_extractor"][1] == "CLIPImageProcessor"
    assert "Pil" not in (tmp_path / "out" / "feature_extractor" / "preprocessor_config.json").read_text()
    names = load_file(tmp_path / "out" / "safety_checker" / "model.safetensors")
    assert all(name.startswith("vision_model.vision_model.") for name in names if name.startswith("vision_model."))
    assert "visual_projection.weight" in names
    reloaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert content_hash(reloaded.safety_checker.state_dict()) == content_hash(checker.state_dict())
    assert type(reloaded.feature_extractor) is CLIPImageProcessor
