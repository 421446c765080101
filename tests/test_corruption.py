"""The law of everything that is loaded: a damaged file is one line that names it, never a traceback or another model.

Each case damages one file in one way. Loading must end in an EraseError of one line, or give a model that works: some
damage cannot be seen, such as another learning rate, and some does no harm.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from loaded import load_sd
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase import cli, delta, masks, tensor_files
from erase.errors import EraseError
from erase.families import loading, pipeline_folder, sd, stored_unet

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json")
CONFIGS += ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json")


@pytest.fixture(scope="module")
def whole(toy_pipeline_dir, tmp_path_factory) -> Path:
    """The toy pipeline with the older tokenizer files as well."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    pipeline_folder.write_pipeline(StableDiffusionPipeline.from_pretrained(toy_pipeline_dir), folder)
    return folder


@pytest.fixture
def model_dir(whole, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def check_line(error: pytest.ExceptionInfo[EraseError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400 + len(os.environ["PYTEST_CURRENT_TEST"]), message
    return message


def works(model: sd.StableDiffusion) -> None:
    """A model that was accepted predicts, encodes and draws finite numbers."""
    text = model.encode_text(["a cat", ""])
    x = torch.zeros(2, 4, 4, 4)
    with torch.no_grad():
        assert model(x, torch.tensor([0, 999]), text).isfinite().all()
    mean, _ = model.encode_images(torch.zeros(1, 3, 8, 8))
    assert mean.isfinite().all() and model.decode(mean).isfinite().all() and model.resolution == 8
    assert model.draw(["a"], [0], steps=2, guidance=2.0, size=8).isfinite().all()


def refused_or_works(folder: Path) -> str | None:
    try:
        model = load_sd(folder)
    except EraseError as error:
        message = str(error)
        assert "\n" not in message and len(message.replace(str(folder), "")) < 400, message
        return message
    works(model)
    return None


# --- bytes ----------------------------------------------------------------------------------------------------------


def link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


BYTES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "empty": rewrite(lambda data: b""),
    "half": rewrite(lambda data: data[: len(data) // 2]),
    "one byte less": rewrite(lambda data: data[:-1]),
    "zeros": rewrite(lambda data: bytes(len(data))),
    "no text": rewrite(lambda data: b"\xff\xfe" + data),
    "flipped": rewrite(lambda data: data[:9] + bytes([data[9] ^ 0xFF]) + data[10:]),
    "a folder": folder_instead,
    "a link to itself": link_loop,
}
# what may go: the tokenizer's older files and its newer one stand in for each other
SPARE = {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json"}


SOME = {"half", "deleted", "a folder"}


@pytest.mark.parametrize(
    "damage",
    [damage if damage in SOME else pytest.param(damage, marks=[pytest.mark.slow, pytest.mark.ci]) for damage in BYTES],
)
def test_a_damaged_file_of_a_model_is_one_line(damage, whole, tmp_path):
    """Every file of a pipeline folder, damaged in every way that a copy can be (4.10)."""
    for source in sorted(path for path in whole.rglob("*") if path.is_file()):
        name = source.relative_to(whole).as_posix()
        folder = Path(shutil.copytree(whole, tmp_path / name.replace("/", "-")))
        BYTES[damage](folder / name)
        if (folder / name).is_file() and (folder / name).read_bytes() == source.read_bytes():
            continue
        message = refused_or_works(folder)
        may_pass = name in SPARE or (damage == "one byte less" and not name.endswith(".safetensors"))  # a line's end
        assert message or may_pass, f"{name} {damage}: accepted"


# --- JSON -----------------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "list": [[]],
    "null": None,
    "text": "64",
    "number": -1.5,
    "zero": 0,
    "nan": float("nan"),
    "object": {"a": 1},
    "huge": 10**30,
}


@pytest.mark.parametrize("kind", ["list", "null", "number", "deep"])
def test_a_json_file_that_holds_another_kind_is_one_line(kind, whole, tmp_path):
    """A list, null, a number, or nesting that overflows the parser in the place of an object (4.10)."""
    content = {"list": "[1, 2]", "null": "null", "number": "3", "deep": "[" * 100_000}[kind]
    for config in CONFIGS:
        folder = Path(shutil.copytree(whole, tmp_path / config.replace("/", "-")))
        (folder / config).write_text(content)
        assert refused_or_works(folder), config


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("config", [config for config in CONFIGS if "tokenizer.json" not in config])
@pytest.mark.filterwarnings("ignore:(?s).*is outdated. `steps_offset`:FutureWarning")  # of old schedulers, by diffusers
def test_no_value_of_a_config_is_a_traceback(config, value, model_dir):
    """Each key of each config with a value of another type: an error, or a model that works (3.6, 4.10)."""
    content = json.loads((model_dir / config).read_text())
    for key in content:
        (model_dir / config).write_text(json.dumps(content | {key: VALUES[value]}))
        refused_or_works(model_dir)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ("unet/config.json", "in_channels", "4"),
        ("unet/config.json", "sample_size", None),
        ("unet/config.json", "sample_size", [4, 4]),
        ("unet/config.json", "sample_size", 0),
        ("unet/config.json", "norm_eps", float("nan")),
        ("unet/config.json", "norm_eps", "1e-5"),
        ("unet/config.json", "norm_eps", -1.5),
        ("unet/config.json", "mid_block_scale_factor", 0),
        ("unet/config.json", "freq_shift", 10**30),
        ("unet/config.json", "_diffusers_version", None),
        ("unet/config.json", "block_out_channels", 4),
        ("unet/config.json", "cross_attention_dim", 8.0),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "scaling_factor", float("nan")),
        ("vae/config.json", "scaling_factor", "0.18215"),
        ("vae/config.json", "scaling_factor", -0.18215),
        ("vae/config.json", "latent_channels", True),
        ("text_encoder/config.json", "hidden_size", "8"),
        ("text_encoder/config.json", "vocab_size", None),
        ("scheduler/scheduler_config.json", "beta_start", "0.00085"),
        ("scheduler/scheduler_config.json", "beta_end", float("inf")),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10),
        ("scheduler/scheduler_config.json", "beta_schedule", 3),
        ("tokenizer/tokenizer_config.json", "model_max_length", "77"),
        ("tokenizer/tokenizer_config.json", "model_max_length", 5),
        ("tokenizer/tokenizer_config.json", "bos_token", "a"),
        ("tokenizer/tokenizer_config.json", "padding_side", "left"),
        ("tokenizer/tokenizer_config.json", "truncation_side", "left"),
        ("scheduler/scheduler_config.json", "steps_offset", 2000),
        ("scheduler/scheduler_config.json", "trained_betas", [0.0] * 1000),
        ("text_encoder/config.json", "layer_norm_eps", 1e8),
        ("text_encoder/config.json", "return_dict", False),
        ("text_encoder/config.json", "quantization_config", {"load_in_8bit": True}),
        ("vae/config.json", "scaling_factor", 1e-30),
        ("vae/config.json", "scaling_factor", 1e8),
        ("model_index.json", "scheduler", ["diffusers", "KarrasVeScheduler"]),
        ("model_index.json", "scheduler", ["diffusers", "RePaintScheduler"]),
        ("model_index.json", "scheduler", ["diffusers", "ScoreSdeVeScheduler"]),
        ("model_index.json", "unet", "UNet2DConditionModel"),
        ("model_index.json", "scheduler", []),
        ("model_index.json", "scheduler", ["diffusers", "UNet2DConditionModel"]),
        ("model_index.json", "text_encoder", [1, 2]),
    ],
)
def test_a_wrong_value_of_a_config_is_refused_and_named(config, key, value, model_dir):
    """Numbers as text, null, NaN, zero and lists, where the model needs a number (3.6)."""
    content = json.loads((model_dir / config).read_text())
    (model_dir / config).write_text(json.dumps(content | {key: value}))
    message = refused_or_works(model_dir)
    assert message is not None and (key in message or config.split("/")[0] in message)


def test_a_value_that_old_configs_lack_has_its_default(model_dir):
    """Stable Diffusion 1.4's VAE config has no scaling_factor: 0.18215 then (3.6)."""
    path = model_dir / "vae/config.json"
    content = json.loads(path.read_text())
    del content["scaling_factor"]
    path.write_text(json.dumps(content))
    assert load_sd(model_dir).vae.config["scaling_factor"] == 0.18215


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "part"), [(UNET, "unet"), (VAE, "vae"), (TEXT, "text_encoder")])
@pytest.mark.parametrize("value", [0.0, 60_000.0])
def test_weights_that_load_but_compute_nothing_are_refused(path, part, value, model_dir):
    """All zero, everything gives the same; very large, NaN comes out. Such a model cannot be erased from (3.6)."""
    tensors = load_file(model_dir / path)
    save_file({name: torch.full_like(tensor, value) for name, tensor in tensors.items()}, model_dir / path)
    message = refused_or_works(model_dir)
    assert message and part in message and ("not finite" in message or "the same" in message), message


@pytest.mark.parametrize("length", [0, 1, 9, 17, 26, 33, 41, 50])
def test_weights_are_aligned_alike_whatever_wrote_their_file(length, model_dir):
    """Other writers pad headers to 8 bytes, and a mapped tensor that begins elsewhere gives other bits (2.13)."""
    for path in (UNET, VAE, TEXT):
        save_file(load_file(model_dir / path), model_dir / path, {"format": "pt", "note": "x" * length})
    model = load_sd(model_dir)
    for part in (model.unet, model.vae, model.text_encoder, model.stored_network()):
        for name, tensor in part.state_dict().items():
            assert tensor.data_ptr() % tensor_files.ALIGNMENT == 0, name


@pytest.mark.parametrize("length", [0, 9, 17, 33])
def test_tensors_of_any_file_are_aligned_alike(length, tmp_path):
    """Of files of others, and inside a file, where a tensor of odd length moves what follows it (2.13)."""
    tensors = {f"{i}.w": torch.randn(3 + i) for i in range(5)} | {"h": torch.ones(3).half()}
    save_file(tensors, tmp_path / "f", {"note": "x" * length})
    found = tensor_files.read_tensors(tmp_path / "f")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.data_ptr() % tensor_files.ALIGNMENT == 0 for tensor in found.values())


@pytest.mark.parametrize("path", [UNET, VAE, TEXT])
@pytest.mark.parametrize("bad", ["nan", "inf", "int8", "float8_e4m3fn", "bool"])
def test_weights_that_are_no_finite_numbers_are_refused(path, bad, model_dir):
    """NaN, infinity, and quantized weights are named; a half precision copy of the same is fine (3.6)."""
    tensors = load_file(model_dir / path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    half = {key: tensor.half() for key, tensor in tensors.items()}
    save_file(half, model_dir / path)
    works(load_sd(model_dir))  # control
    if bad in {"nan", "inf"}:
        half[name].view(-1)[-1] = float(bad)
    else:
        half[name] = half[name].to(getattr(torch, bad))
    save_file(half, model_dir / path)
    message = refused_or_works(model_dir)
    assert message and f"'{name}'" in message or message and bad in {"nan", "inf"} and "not finite" in message
    assert "finite" in message or "is stored as" in message


# --- indices and pickles --------------------------------------------------------------------------------------------


def sharded(folder: Path, variant: str = "") -> Path:
    """Split the UNet's weights into two shards; the index."""
    tensors = load_file(folder / UNET)
    names, dot = sorted(tensors), f".{variant}" if variant else ""
    (folder / UNET).unlink()
    shards = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"diffusion_pytorch_model{dot}-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "unet" / file)
        shards |= dict.fromkeys(part, file)
    index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{dot}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))
    return index


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_an_index_names_safetensors_files_of_its_own_folder_and_nothing_else(variant, model_dir, whole, tmp_path):
    """A shard that is a pickle, outside the folder, missing, or no name: refused before it is opened (2.5)."""
    index = sharded(model_dir, variant)
    loaded = load_sd(model_dir)  # control
    assert torch.equal(loaded.unet.conv_in.weight, load_sd(whole).unet.conv_in.weight)
    content = json.loads(index.read_text())
    names = list(content["weight_map"])
    torch.save(load_file(whole / UNET), model_dir / "unet" / "weights.bin")
    shutil.copy(whole / UNET, tmp_path / "outside.safetensors")
    bad: list[Any] = [
        "weights.bin",
        "../../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "gone.safetensors",
    ]
    for value in [*bad, 3, None, "..", ""]:
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {names[0]: value}}))
        for load in (loading.load, stored_unet.load_unet):
            with pytest.raises(EraseError) as error:
                load(model_dir)
            assert index.name in check_line(error)
    for value in ([], None, "x", {}):
        index.write_text(json.dumps(content | {"weight_map": value}))
        assert refused_or_works(model_dir)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_a_whole_file_beside_shards_is_never_read(variant, model_dir, whole):
    """An interrupted conversion leaves both; diffusers reads the shards that the index names."""
    expected = load_file(whole / UNET)
    sharded(model_dir, variant)
    dot = f".{variant}" if variant else ""
    other = {name: tensor + 1 for name, tensor in expected.items()}
    save_file(other, model_dir / "unet" / f"diffusion_pytorch_model{dot}.safetensors")
    model = load_sd(model_dir)
    for found in (model.unet.state_dict(), model.stored_weights(), pipeline_folder.read_weights(model_dir / "unet")):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_form_of_pickle_is_read_without_permission(model_dir, whole, tmp_path, monkeypatch):
    """Plain, sharded and variant pickles in each component; torch.load is never reached (2.5)."""
    monkeypatch.setattr(torch, "load", None)
    for name, stem in ((UNET, "diffusion_pytorch_model"), (VAE, "diffusion_pytorch_model"), (TEXT, "pytorch_model")):
        folder = Path(shutil.copytree(whole, tmp_path / Path(name).parts[0]))
        part = (folder / name).parent
        (folder / name).unlink()
        for file in (f"{stem}.bin", f"{stem}.fp16.bin", f"{stem}-00001-of-00001.bin"):
            (part / file).write_bytes(b"a pickle")
            with pytest.raises(EraseError, match="a pickle can run code when loaded"):
                load_sd(folder)
            (part / file).unlink()
        weights = {"weight_map": {"conv_in.weight": "evil.bin"}}
        (part / f"{stem}.bin.index.json").write_text(json.dumps(weights))
        with pytest.raises(EraseError):
            load_sd(folder)


def test_a_pickle_beside_safetensors_weights_is_not_read(model_dir, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    for path in (UNET, VAE, TEXT):
        (model_dir / path).with_suffix(".bin").write_bytes(b"a pickle")
    works(load_sd(model_dir))


# --- the system -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", UNET, "tokenizer/vocab.json"])
def test_a_file_that_may_not_be_read_is_one_line(name, model_dir, monkeypatch):
    """Permissions of somebody else's file, as a user who is not root meets them (4.7)."""
    import builtins
    import pathlib

    plain_open, plain_is_file = builtins.open, pathlib.Path.is_file

    def refuse(path: Any) -> None:
        if isinstance(path, (str, Path)) and str(path) == str(model_dir / name):
            raise PermissionError(13, "Permission denied", str(path))

    def opened(path: Any, *more: Any, **options: Any) -> Any:
        refuse(path)
        return plain_open(path, *more, **options)

    def is_file(path: Path) -> bool:
        refuse(path)
        return plain_is_file(path)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(pathlib.Path, "is_file", is_file)
    with pytest.raises(EraseError, match="ermission denied") as error:
        load_sd(model_dir)
    check_line(error)


def test_names_that_the_system_refuses_are_one_line(tmp_path, monkeypatch):
    for source in ("x" * 5000, "a/" + "x" * 300, "~nobody-here/model", "a\0b", "", " ", str(tmp_path / ("y" * 300))):
        with pytest.raises(EraseError) as error:
            load_sd(source)
        assert "\n" not in str(error.value)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(EraseError):
        load_sd(loop)


# --- deltas ---------------------------------------------------------------------------------------------------------


def state() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"unet.a.weight": torch.randn(5, 3, generator=draw), "unet.b.bias": torch.randn(7, generator=draw)}


def moved(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"unet.a.weight": base["unet.a.weight"] + torch.eye(5, 3), "unet.b.bias": base["unet.b.bias"].clone()}


PROVENANCE = {"base": "toy", "made_for": "toy", "concept": {"name": "circle"}, "method": "salun"}


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["erase"])


def with_header(path: Path, header: Any) -> None:
    tensors = load_file(path)
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, {tensor_files.METADATA_KEY: text})


JSON_VALUES: list[Any] = [None, 3, -1.5, "x", [], [[]], {}, {"a": 1}, True, float("nan"), [["a"]], [["a", [2.5]]]]


def test_a_damaged_delta_is_one_line(tmp_path):
    """Each header value of each type, each tensor missing, of another dtype, shape or content, and bytes (4.10).

    What loads either does exactly what the delta did, or is refused when it is applied.
    """
    base, path = state(), tmp_path / "delta.safetensors"
    new = moved(base)
    delta.save(path, delta.difference(base, new, PROVENANCE))
    content, header = path.read_bytes(), header_of(path)
    tensors = load_file(path)
    count = 0

    def check() -> None:
        nonlocal count
        count += 1
        try:
            change = delta.load(path)
            reached = delta.apply(base, change)
            delta.summary(change, lambda name: name)
            assert delta.content_hash(delta.remove(reached, change)) == delta.content_hash(base)
            assert all(torch.equal(reached[name], new[name]) for name in new)
        except EraseError as error:
            assert "\n" not in str(error) and len(str(error).replace(str(path), "")) < 400

    check()  # control
    for damage in BYTES:
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        path.write_bytes(content)
        BYTES[damage](path)
        check()
    path.unlink() if not path.is_dir() else path.rmdir()
    for key in header:
        for value in JSON_VALUES:
            save_file(tensors, path)
            with_header(path, header | {key: value})
            check()
        with_header(path, {name: value for name, value in header.items() if name != key})
        check()
    for entry in (*JSON_VALUES, ["float32", [5, 3, 1]], ["float16", [5, 3]], ["load", [5, 3]], ["float32", [-5, -3]]):
        save_file(tensors, path)
        with_header(path, header | {"layout": header["layout"] | {"unet.a.weight": entry}})
        check()
    for text in ("", "[]", "null", "3", "{", '"x"', "[" * 100_000):
        save_file(tensors, path)
        with_header(path, text)
        check()
    for name, tensor in tensors.items():
        changed: list[Any] = [None, tensor[:-1], torch.cat([tensor, tensor]), tensor.to(torch.int64), tensor[None]]
        changed += [~tensor if not tensor.is_floating_point() else tensor * torch.nan, tensor.half()]
        for value in changed:
            left = {key: item for key, item in tensors.items() if key != name}
            save_file(left if value is None else left | {name: value.contiguous()}, path, {"erase": json.dumps(header)})
            check()
    save_file(
        {**tensors, "x": torch.zeros(1), "unet.a.weight.more": torch.zeros(1)}, path, {"erase": json.dumps(header)}
    )
    check()
    assert count > 100


def test_inspect_of_a_damaged_file_is_one_line(tmp_path, capsys):
    """The command reads the same header; it never ends in a traceback (4.10)."""
    base, path = state(), tmp_path / "delta.safetensors"
    delta.save(path, delta.difference(base, moved(base), PROVENANCE))
    header, tensors = header_of(path), load_file(path)
    for changed in [{**header, "provenance": {"concept": 3}}, {**header, "layout": 1}, [], {**header, "kind": "mask"}]:
        save_file(tensors, path)
        with_header(path, changed)
        with pytest.raises(SystemExit) as end:
            cli.main(["inspect", str(path)])
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# --- masks ----------------------------------------------------------------------------------------------------------


def test_a_damaged_mask_is_one_line(tmp_path):
    """Each header value of each type, each tensor, and bytes (4.10)."""
    path, count = tmp_path / "mask.safetensors", 0
    mask = {"a": torch.tensor([[True, False, True]] * 3), "b": torch.ones(11, dtype=torch.bool)}
    parameters = {name: bits.float() for name, bits in mask.items()}
    masks.save(path, mask, {"base": "toy", "base_hash": "0" * 64})
    content, header, tensors = path.read_bytes(), header_of(path), load_file(path)

    def check() -> None:
        nonlocal count
        count += 1
        try:
            loaded, read = masks.load(path)
            masks.check(loaded, read.made, parameters)
            masks.fraction_by_block(loaded, lambda name: name)
            assert sum(int(bits.sum()) for bits in loaded.values()) == header["ones"]
        except EraseError as error:
            assert "\n" not in str(error) and len(str(error).replace(str(path), "")) < 400

    check()
    for damage in BYTES:
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        path.write_bytes(content)
        BYTES[damage](path)
        check()
    path.unlink() if not path.is_dir() else path.rmdir()
    for key in header:
        for value in (
            *JSON_VALUES,
            [["a", [9]], ["a", [9]]],
            [["a", [3, 3]], ["b", 11]],
            [["a", [-3, -3]], ["b", [11]]],
        ):
            save_file(tensors, path)
            with_header(path, header | {key: value})
            check()
        with_header(path, {name: value for name, value in header.items() if name != key})
        check()
    for text in ("", "[]", "null", "[" * 100_000):
        save_file(tensors, path)
        with_header(path, text)
        check()
    for name, tensor in tensors.items():
        for value in (None, tensor[:-1], tensor.to(torch.int64), tensor[None], tensor.half(), ~tensor):
            left = {key: item for key, item in tensors.items() if key != name}
            save_file(left if value is None else left | {name: value.contiguous()}, path, {"erase": json.dumps(header)})
            check()
    assert count > 80


def test_a_damaged_mask_of_the_reference_code_is_one_line(tmp_path):
    path = tmp_path / "with_0.5.pt"
    torch.save({"a": torch.ones(3, dtype=torch.int64)}, path)
    content = path.read_bytes()
    assert masks.load_reference(path, str)["a"].all()  # control
    values: list[Any] = [{}, [], None, {"a": 1}, {1: torch.ones(2)}, {"a": torch.full((2,), torch.nan)}]
    values += [{"a": torch.ones(2, dtype=torch.complex64)}, {"a": torch.eye(2).to_sparse()}, {"a": torch.tensor([2])}]
    for value in values:
        torch.save(value, path)
        with pytest.raises(EraseError) as error:
            masks.load_reference(path, str)
        check_line(error)
    for damage in ("deleted", "empty", "half", "one byte less", "zeros", "a folder", "a link to itself"):
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        path.write_bytes(content)
        BYTES[damage](path)
        with pytest.raises(EraseError) as error:
            masks.load_reference(path, str)
        check_line(error)
