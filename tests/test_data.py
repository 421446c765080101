"""Laws of the data: nothing is drawn twice, n processes draw what one draws, and every image has its own words."""

import csv
import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
import torch
from loaded import load_sd
from PIL import Image

from erase import tensor_files
from erase.concepts import Concept
from erase.data.cache import Source, Workers, cached
from erase.data.latents import Data, Plan, gather
from erase.data.sources import list_images
from erase.errors import EraseError
from erase.families import sd

CONCEPT = Concept(
    name="circle",
    kind="object",
    forget=("a circle", "red circle", "a circle"),
    anchor=("a square", "red square", "a star"),
    retain=("a moon", "a tree"),
    others=("a fish", "a moon"),
)
PLAN = Plan(num_forget=7, num_retain=4, steps=2, guidance=2.0, size=8, batch_size=2, seed=0)


@pytest.fixture(scope="module")
def model(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(toy_pipeline_dir)


@pytest.fixture
def collect(model, tmp_path):
    """`gather` of the toy model, with a cache of its own."""

    def collect(concept: Concept = CONCEPT, plan: Plan = PLAN, model_hash: str = "toy", **more) -> Data:
        options = {"cache_dir": tmp_path / "cache"} | more
        return gather(model, concept, plan, model_hash=model_hash, quiet=True, **options)

    return collect


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The prompts that are drawn from now on."""
    prompts: list[str] = []
    draw = sd.StableDiffusion.draw

    def spy(self, texts, *rest, **options):
        prompts.extend(texts)
        return draw(self, texts, *rest, **options)

    monkeypatch.setattr(sd.StableDiffusion, "draw", spy)
    return prompts


def same(a: Data, b: Data) -> bool:
    pairs = [(a.forget, b.forget), (a.retain, b.retain)]
    tensors = [(getattr(p, name), getattr(q, name)) for p, q in pairs for name in ("mean", "std", "prompt")]
    tensors += [(a.anchor, b.anchor), (a.others, b.others), (a.text.states, b.text.states)]
    return all(torch.equal(x, y) for x, y in tensors) and (a.prompts, a.fingerprint) == (b.prompts, b.fingerprint)


def words(data: Data, rows: torch.Tensor) -> list[str]:
    return [data.prompts[row] for row in rows]


def image(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_every_image_has_its_own_prompt_anchor_and_text(collect, model):
    data = collect()
    assert words(data, data.forget.prompt) == ["a circle", "red circle", "a circle"] * 2 + ["a circle"]
    assert words(data, data.anchor) == ["a square", "red square", "a star"] * 2 + ["a square"]
    assert words(data, data.retain.prompt) == ["a moon", "a tree"] * 2
    assert words(data, data.others) == ["a fish", "a moon"]
    assert data.prompts[0] == "" and len(set(data.prompts)) == len(data.prompts)
    assert torch.equal(data.text.text_states, model.encode_text(data.prompts).text_states)
    assert data.forget.mean.shape == (7, 4, 4, 4) and not data.forget.std.any()
    last = model.draw(["a circle"], [6], steps=2, guidance=2.0, size=8)  # seeds count from seed * 1_000_000
    assert torch.allclose(data.forget.mean[6:], last, atol=1e-5)  # another batch, other roundings


def test_what_is_in_the_cache_is_not_drawn_again(collect, drawn):
    first = collect()
    assert len(drawn) == 11  # control
    drawn.clear()
    assert same(collect(), first)
    assert drawn == []


@pytest.mark.parametrize("kind", damage.DAMAGES)
def test_a_damaged_chunk_is_named_and_generated_again(kind, collect, drawn, tmp_path):
    """(2.2)"""
    first, said = collect(), []
    path = sorted((tmp_path / "cache" / "latents").rglob("000002.safetensors"))[0]
    whole = path.read_bytes()
    drawn.clear()
    assert same(collect(tell=said.append), first) and not said and not drawn  # control
    damage.DAMAGES[kind](path)
    if path.is_dir():
        with pytest.raises(EraseError, match="000002.safetensors: Is a directory"):
            collect()
        return
    assert same(collect(tell=said.append), first)
    assert len(said) == 1 and str(path) in said[0] and said[0].endswith("images are generated again")
    assert "\n" not in said[0] and len(drawn) == 2 and path.read_bytes() == whole


def test_a_chunk_that_is_damaged_after_it_was_read_or_written_does_no_harm(collect, drawn, tmp_path, monkeypatch):
    """Of three chunks in the cache the last is missing. While it is generated, another program damages all three."""
    first = collect()
    folder = sorted((tmp_path / "cache" / "latents").rglob("000002.safetensors"))[0].parent
    last = sorted(folder.iterdir())[-1]
    last.unlink()
    write, damaged = tensor_files.write_tensors, []

    def write_and_damage(path, *rest, **options):
        write(path, *rest, **options)
        for chunk in folder.iterdir():
            size = chunk.stat().st_size
            with open(chunk, "r+b") as file:  # in place: what is mapped into memory changes too
                file.seek(size - 64)
                file.write(b"\xff" * 64)
            damaged.append(chunk)

    monkeypatch.setattr(tensor_files, "write_tensors", write_and_damage)
    assert same(collect(), first)
    monkeypatch.setattr(tensor_files, "write_tensors", write)
    assert len(damaged) > 1
    said: list[str] = []
    assert same(collect(tell=said.append), first) and len(said) == len(damaged)  # control: they are damaged


def test_a_damaged_chunk_of_another_process_is_generated_again(collect, drawn, tmp_path):
    whole, said = collect(), []
    chunks = sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))

    def damage_all() -> None:
        for chunk in chunks:
            chunk.write_bytes(b"")

    assert same(collect(workers=Workers(0, 2, damage_all), tell=said.append), whole)
    assert said and all("generated again" in line for line in said)


def test_a_chunk_of_another_place_is_not_taken(collect, drawn, tmp_path):
    """Whole, with a right hash, but of other rows (2.2)."""
    first, said = collect(), []
    chunks = sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    shutil.copy(chunks[0], chunks[1])
    drawn.clear()
    assert same(collect(tell=said.append), first) and len(said) == 1 and len(drawn) == 2


@pytest.mark.parametrize(
    "changed",
    [
        dict(model_hash="another"),
        dict(plan=replace(PLAN, seed=1)),
        dict(plan=replace(PLAN, steps=3)),
        dict(plan=replace(PLAN, sampler="dpm++")),
        dict(plan=replace(PLAN, guidance=3.0)),
        dict(plan=replace(PLAN, batch_size=3)),
        dict(concept=replace(CONCEPT, forget=("a ring",) * 3, retain=("a cube",))),
    ],
    ids=["model", "seed", "steps", "sampler", "guidance", "batch size", "prompts"],
)
def test_images_of_another_job_are_not_taken(collect, drawn, changed):
    first = collect()
    drawn.clear()
    other = collect(**changed)
    assert len(drawn) == 11 and other.fingerprint != first.fingerprint
    assert "plan" not in changed or len(other.forget.mean) == 7


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_images_of_a_model_with_another_vae_or_text_encoder_are_not_taken(part, toy_pipeline_dir, drawn, tmp_path):
    model = load_sd(toy_pipeline_dir)
    gather(model, CONCEPT, PLAN, model_hash="toy", cache_dir=tmp_path, quiet=True)
    drawn.clear()
    with torch.no_grad():
        next(getattr(model, part).parameters()).add_(0.1)
    gather(model, CONCEPT, PLAN, model_hash="toy", cache_dir=tmp_path, quiet=True)
    assert len(drawn) == 11


def test_another_process_finds_the_cache_whatever_the_order_of_diffusers_notes(toy_pipeline_dir, drawn, tmp_path):
    """`_use_default_values` in a scheduler's config is a list made from a set: each process has its own order."""
    model = load_sd(toy_pipeline_dir)
    scheduler: Any = model.scheduler
    for notes in (["a", "b"], ["b", "a"]):
        scheduler._internal_dict = type(scheduler.config)(dict(scheduler.config) | {"_use_default_values": notes})
        drawn.clear()
        gather(model, CONCEPT, PLAN, model_hash="toy", cache_dir=tmp_path, quiet=True)
    assert drawn == []


def test_interrupted_drawing_goes_on_where_it_was(collect, drawn, monkeypatch, tmp_path):
    whole = collect()
    spy = sd.StableDiffusion.draw

    def broken(self, texts, *rest, **options):
        if len(drawn) >= 4:
            raise KeyboardInterrupt
        return spy(self, texts, *rest, **options)

    drawn.clear()
    monkeypatch.setattr(sd.StableDiffusion, "draw", broken)
    with pytest.raises(KeyboardInterrupt):
        collect(cache_dir=tmp_path / "other")
    monkeypatch.setattr(sd.StableDiffusion, "draw", spy)
    drawn.clear()
    assert same(collect(cache_dir=tmp_path / "other"), whole)
    assert len(drawn) == 11 - 4


def test_several_processes_draw_what_one_draws_and_each_image_once(collect, drawn, toy_pipeline_dir, tmp_path):
    """Two threads, each with its own model, in the place of two processes; a barrier in the place of accelerate's."""
    whole = collect()
    drawn.clear()
    with pytest.raises(EraseError, match="no such file"):  # control: rank 0 alone has its share only
        collect(cache_dir=tmp_path / "half", workers=Workers(0, 2))
    assert len(drawn) == 4  # chunks 0 and 2 of the forget images
    drawn.clear()
    barrier = threading.Barrier(2, timeout=60)

    def wait() -> None:
        barrier.wait()

    with ThreadPoolExecutor(2) as pool:
        ranks = [Workers(rank, 2, wait) for rank in range(2)]
        how: dict[str, Any] = {"model_hash": "toy", "quiet": True, "cache_dir": tmp_path / "shared"}
        own = [load_sd(toy_pipeline_dir) for _ in ranks]
        results = list(pool.map(lambda one, rank: gather(one, CONCEPT, PLAN, workers=rank, **how), own, ranks))
    assert same(results[0], whole) and same(results[1], whole)
    assert len(drawn) == 11


def test_a_round_trip_through_pixels_gives_the_posteriors_spread(collect):
    direct, data = collect(), collect(plan=replace(PLAN, round_trip=True))
    assert (data.forget.std > 0).all() and (data.retain.std > 0).all()
    assert not direct.forget.std.any()  # control
    assert data.fingerprint != direct.fingerprint


# --- images ---------------------------------------------------------------------------------------------------------


def test_a_flat_folder_takes_the_concepts_prompts_in_turn(collect, tmp_path):
    for name in ("c.png", "a.JPG", "sub.webp", "b.bmp"):
        image(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    data = collect(plan=replace(PLAN, forget_images=str(tmp_path / "images")))
    assert words(data, data.forget.prompt) == ["a circle", "red circle", "a circle", "a circle"]
    assert words(data, data.anchor) == ["a square", "red square", "a star", "a square"]
    assert data.record["num_forget"] == 4 and data.record["first_seed"] is None
    assert (data.forget.std > 0).all()


def test_class_folders_say_what_they_hold(collect, tmp_path):
    for name in ("church/0.png", "gas_pump/0.png", "apple/0.png"):
        image(tmp_path / "images" / "train" / name)
    data = collect(plan=replace(PLAN, retain_images=str(tmp_path / "images")), concept=replace(CONCEPT, retain=()))
    assert words(data, data.retain.prompt) == ["an image of an apple", "an image of a church", "an image of a gas pump"]


def test_a_metadata_file_names_the_prompts(collect, tmp_path):
    for name in ("a.png", "deep/b.png"):
        image(tmp_path / name)
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["deep/b.png", "red circle"], ["a.png", "two, rings"]])
    data = collect(plan=replace(PLAN, forget_images=str(tmp_path)))
    assert words(data, data.forget.prompt) == ["two, rings", "red circle"]
    assert words(data, data.anchor) == ["a square", "red square"]  # words that the concept does not know: its first


def test_a_caption_with_an_unquoted_comma_is_refused_and_other_columns_are_none_of_its_business(tmp_path):
    """Sizes in a metadata file are those of the images, so any number will do (3.3)."""
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a red circle, on white\n")
    with pytest.raises(EraseError, match=r"metadata\.csv, line 2: 3 fields, but the header has 2"):
        list_images(str(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name;width;seed;text\na.png;501;x;a red circle, on white\n")
    assert [text for _, text in list_images(str(tmp_path))] == ["a red circle, on white"]


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
def test_captions_of_metadata_jsonl_are_taken(column, collect, tmp_path):
    """Also in a folder below, with names relative to it (3.4)."""
    for name in ("a.png", "train/b.png"):
        image(tmp_path / name)
        (tmp_path / name).with_name("metadata.jsonl").write_text(
            json.dumps({"file_name": Path(name).name, column: f"a circle in {name}", "width": 500}) + "\n"
        )
    lines: list[str] = []
    data = collect(plan=replace(PLAN, forget_images=str(tmp_path)), tell=lines.append)
    assert words(data, data.forget.prompt) == ["a circle in a.png", "a circle in train/b.png"]
    assert lines == [f"{tmp_path}: 2 images; 2 captions from metadata"]


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_text_files_beside_images_are_captions_and_a_missing_one_is_said(suffix, collect, tmp_path):
    """An image without a caption takes the concept's prompts, as in a folder without captions (3.4)."""
    for name in "abc":
        image(tmp_path / f"{name}.png")
    (tmp_path / f"a{suffix}").write_text("a red circle,\non white\n", encoding="utf-8-sig")
    (tmp_path / f"b{suffix}").write_text("\n")
    lines: list[str] = []
    data = collect(plan=replace(PLAN, forget_images=str(tmp_path)), tell=lines.append)
    assert words(data, data.forget.prompt) == ["a red circle, on white", "red circle", "a circle"]
    assert lines == [
        f"{tmp_path}: 3 images; 1 caption from text files beside them; "
        "2 without a caption, which get the concept's prompts in turn"
    ]


def test_a_caption_that_is_cut_is_said_and_recorded(collect, tmp_path):
    """As a long prompt is (3.2)."""
    long = "a circle " * 80 + "and a church"
    for name, caption in {"a": long, "b": "a circle"}.items():
        image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    lines: list[str] = []
    data = collect(plan=replace(PLAN, forget_images=str(tmp_path)), tell=lines.append)
    assert data.record["truncated_captions"] == [long] and "truncated: 1, the first 'a circle a circle" in lines[-1]


def test_kohyas_folders_give_a_prompt_and_a_number_of_repeats(collect, tmp_path, monkeypatch):
    """10_circle is the prompt "circle" and ten of each image; a caption beside an image is its prompt instead (3.4)."""
    for name in ("3_red_circle/a.png", "3_red_circle/b.png", "01_church/c.png"):
        image(tmp_path / name, (len(name), 0, 0))
    (tmp_path / "3_red_circle" / "a.txt").write_text("a circle")
    encoded: list[int] = []
    encode = sd.StableDiffusion.encode_images
    monkeypatch.setattr(sd.StableDiffusion, "encode_images", lambda self, x: encoded.append(len(x)) or encode(self, x))
    lines: list[str] = []
    data = collect(plan=replace(PLAN, forget_images=str(tmp_path), num_retain=1), tell=lines.append)
    assert words(data, data.forget.prompt) == ["an image of a church", *["a circle"] * 3, *["red circle"] * 3]
    assert data.record["num_forget"] == 7
    assert torch.equal(data.forget.mean[2], data.forget.mean[3])
    assert sum(encoded) == 5  # batches of two, c a | a a | b b | b, and in each of them no image twice
    assert lines == [
        f"{tmp_path}: 3 images; 1 caption from text files beside them; 2 captions from names of their folders; "
        "7 images including the repeats of folder names"
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.jsonl": '{"file_name": "gone.png", "text": "x"}'}, r"jsonl, line 1: there is no image 'gone\.png'"),
        ({"metadata.jsonl": '{"file_name": "../out.png", "text": "x"}'}, r"line 1: there is no image '\.\./out\.png'"),
        ({"metadata.jsonl": '{"file_name": 7, "text": "x"}'}, "line 1: no file_name"),
        ({"metadata.jsonl": "{"}, "line 1: .*each line must be one JSON object"),
        ({"metadata.csv": "file_name,text\na.png,x\n./a.png,y\n"}, r"line 3: '\./a\.png' already has a caption"),
        ({"a.txt": "x", "gone.txt": "y"}, r"gone\.txt is a caption without an image: no image beside it has this name"),
        ({"a.txt": "x", "a.caption": "y"}, r"a\.png has two captions, a \.txt and a \.caption file"),
        ({"a.txt": b"\xff\xff\xff"}, r"a\.txt, line 1: this is not utf-8 text"),
        ({"2000_x/b.png": b""}, "'2000_x' means 2,000 repeats of its images; rename it"),
    ],
)
def test_captions_that_fit_no_image_are_one_line(files, message, tmp_path):
    """(3.4)"""
    folder = tmp_path / "images"
    image(folder / "a.png")
    image(tmp_path / "out.png")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EraseError, match=message):
        list_images(str(folder))


@pytest.mark.parametrize(("folder", "caption"), [("ch1ld", None), ("photos", "a gіrl in a garden")])
def test_captions_and_folder_names_of_minors_are_refused_before_an_image_is_read(folder, caption, collect, tmp_path):
    """Forget images are a target; retain images may show a child, but not where the concept is nudity (2.11)."""
    image(tmp_path / folder / "a.png")
    if caption:
        (tmp_path / folder / "a.txt").write_text(caption, encoding="utf-8")
    with pytest.raises(EraseError, match=r"does not accept targets that involve minors \(.* of --forget-images"):
        collect(plan=replace(PLAN, forget_images=str(tmp_path)))
    retain = replace(PLAN, retain_images=str(tmp_path))
    collect(plan=retain)
    nudity = replace(CONCEPT, kind="nudity")
    with pytest.raises(EraseError, match=r"minors in a sexual context \(.* of --retain-images"):
        collect(nudity, plan=retain)


def test_images_are_cut_to_a_square_in_the_middle_and_stand_upright(tmp_path):
    """An image 16 wide and 8 high, blue but for a red middle; turned on its side with a note to turn it back."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[:, 4:12] = (255, 0, 0)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise
    pixels[:4, 4:12] = (0, 255, 0)
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "b.png", exif=exif)
    (plain, _), (turned, _) = list_images(str(tmp_path))
    assert torch.equal(plain.pixels(8), torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 8, 8))
    assert torch.equal(turned.pixels(8)[1, :, 0], torch.tensor([1.0] * 4 + [-1.0] * 4))
    assert plain.pixels(16).shape == (3, 16, 16)


def test_latents_lie_in_memory_as_the_cache_gives_them_back(tmp_path):
    """Computations follow the strides, so a first run would differ from a second one in its last bits."""
    made = torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last)
    source = Source(["a", "b"], lambda rows: {"mean": made, "std": made[:, :1].expand(2, 2, 3, 4)}, "a test")
    first, second = (cached(tmp_path, source, 2, Workers(), "images", True, print) for _ in range(2))
    for name in ("mean", "std"):
        assert torch.equal(first[name], second[name])
        assert first[name].stride() == second[name].stride()


def test_image_latents_are_cached_by_content_and_by_batch(collect, tmp_path, monkeypatch):
    for number in range(5):
        image(tmp_path / "images" / f"{number}.png", (number * 50, 0, 0))
    plan = replace(PLAN, forget_images=str(tmp_path / "images"))
    first = collect(plan=plan)
    (tmp_path / "images").rename(tmp_path / "moved")
    small = collect(plan=replace(plan, forget_images=str(tmp_path / "moved"), batch_size=1))
    assert torch.allclose(small.forget.mean, first.forget.mean, atol=1e-5)  # not chunks of another size
    monkeypatch.setattr(sd.StableDiffusion, "encode_images", None)
    assert same(collect(plan=replace(plan, forget_images=str(tmp_path / "moved"))), first)
    image(tmp_path / "moved" / "0.png", (9, 9, 9))
    with pytest.raises(TypeError):
        collect(plan=replace(plan, forget_images=str(tmp_path / "moved")))


def test_depth_and_transparency_are_read_as_everywhere(tmp_path):
    """16 bits are scaled to 8, and what is transparent is white (3.1)."""
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "deep.png")  # 128 of 255
    (clear, _), (deep, _) = list_images(str(tmp_path))
    assert torch.equal(clear.pixels(8), torch.ones(3, 8, 8))
    assert torch.equal(deep.pixels(8), torch.full((3, 8, 8), 128.0) / 127.5 - 1)


def test_an_animation_is_refused_by_name(tmp_path):
    """(3.1)"""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.png", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    for image, _ in list_images(str(tmp_path)):
        with pytest.raises(EraseError, match=r"cannot read the image .*[ab]\.(png|webp) \(animated\)"):
            image.pixels(8)


def test_hidden_files_are_not_trained_on(tmp_path):
    """(3.5)"""
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png"):
        image(tmp_path / name)
    assert [Path(image.name).name for image, _ in list_images(str(tmp_path))] == ["a.png"]


def test_errors_name_what_is_wrong(collect, tmp_path, drawn, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed

    def forget_from(folder: Path) -> Data:
        return collect(plan=replace(PLAN, forget_images=str(folder)))

    with pytest.raises(EraseError, match=r"^concept 'circle' has no retain prompts; give --retain PROMPT$"):
        collect(replace(CONCEPT, retain=()))
    with pytest.raises(EraseError, match="^--resolution is 12; the sides that .* generates are multiples of 8$"):
        collect(plan=replace(PLAN, size=12))
    with pytest.raises(EraseError, match="nowhere: no such folder, .*; pip install datasets$"):
        forget_from(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EraseError, match=r"^.*empty holds no image \(\.bmp, .*\)$"):
        forget_from(tmp_path / "empty")
    image(tmp_path / "flat" / "0.png")
    with pytest.raises(EraseError, match="no retain prompts; --retain-images .*flat names no prompts either"):
        collect(replace(CONCEPT, retain=()), replace(PLAN, retain_images=str(tmp_path / "flat")))
    for text, words in [
        ("file_name,text\ngone.png,x\n", "line 2: there is no image 'gone.png'"),
        ("image,text\n0.png,x\n", "line 2: no file_name; the columns file_name and text are needed"),
        ("file_name,text\n0.png,\xe9\n", "line 2: this is not utf-8 text"),
    ]:
        (tmp_path / "flat" / "metadata.csv").write_text(text, encoding="latin-1")
        with pytest.raises(EraseError, match=words):
            forget_from(tmp_path / "flat")
    assert drawn == []  # all of this is said before anything is drawn


def test_a_bad_retain_image_is_an_error_before_any_forget_image_is_generated(collect, drawn, tmp_path):
    """And the order of reading changes nothing in the data (3.5)."""
    folder = tmp_path / "retain"
    image(folder / "moon.png")
    plan = replace(PLAN, retain_images=str(folder))
    data = collect(plan=plan)
    assert data.prompts[:3] == ("", "a circle", "red circle") and words(data, data.retain.prompt) == ["a moon"]
    (folder / "bad.png").write_bytes(b"no image")
    drawn.clear()
    with pytest.raises(EraseError, match=r"cannot read the image .*bad\.png \(not an image\)"):
        collect(plan=plan, cache_dir=tmp_path / "other")
    assert drawn == []


@pytest.mark.parametrize("content", [b"", b"no image", "half"], ids=["empty", "text", "truncated"])
def test_an_image_that_cannot_be_read_is_named(collect, tmp_path, content):
    image(tmp_path / "good.png", size=(64, 64))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(EraseError, match=r"^cannot read the image .*bad\.png \(.*\); repair or remove it$"):
        collect(plan=replace(PLAN, forget_images=str(tmp_path)))
