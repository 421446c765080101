"""Laws of the delta: save, load, apply is the new model; remove is the base; no other model is accepted."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erase.delta import apply, content_hash, difference, load, remove, save, summary
from erase.errors import EraseError
from erase.tensor_files import read_metadata, read_tensors, write_tensors

OLD = Path(__file__).parent / "old"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PROVENANCE = {"made_for": "sd14", "concept": "circle", "method": "relabel", "seed": 0}


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with an odd size, a scalar, an integer buffer and an empty tensor."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "unet.conv_in.weight": torch.randn(4, 3, 3, 3, generator=draw).to(dtype),
        "unet.attn2.to_k.weight": torch.randn(8, 8, generator=draw).to(dtype),
        "unet.norm.bias": torch.randn(13, generator=draw).to(dtype),
        "scale": torch.tensor(1.5, dtype=dtype),
        "steps": torch.tensor([7]),
        "empty": torch.zeros(0, dtype=dtype),
    }


def edited(base: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """Half of `to_k` and the scalar are new; the rest is the base."""
    draw = torch.Generator().manual_seed(seed)
    weight = base["unet.attn2.to_k.weight"]
    moved = torch.rand(weight.shape, generator=draw) < 0.5
    noise = torch.randn(weight.shape, generator=draw).to(weight.dtype)
    return base | {"unet.attn2.to_k.weight": torch.where(moved, weight + noise, weight), "scale": base["scale"] * 2}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name in a
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_save_load_apply_is_the_new_model_and_remove_is_the_base(dtype, tmp_path):
    base = model(dtype)
    new = edited(base)
    assert not same_bits(base, new)
    save(tmp_path / "delta.safetensors", difference(base, new, PROVENANCE))
    delta = load(tmp_path / "delta.safetensors")
    assert same_bits(apply(base, delta), new)
    assert same_bits(remove(new, delta), base)
    assert same_bits(base, model(dtype))  # apply changed nothing in place
    assert delta.provenance == PROVENANCE


def test_a_delta_of_version_0_1_0_is_read_and_written_again_in_the_same_words():
    """The file was written by that version's code."""
    path = OLD / "delta-0.1.0.safetensors"
    base = {
        "unet.attn2.to_k.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "unet.conv.bias": torch.arange(5, dtype=torch.float16),
    }
    delta = load(path)
    assert delta.changed == {"unet.attn2.to_k.weight": 4} and delta.provenance["method"] == "salun"
    new = apply(base, delta)
    assert torch.equal(new["unet.attn2.to_k.weight"][1], base["unet.attn2.to_k.weight"][1] + 0.5)
    assert same_bits(remove(new, delta), base)
    assert json.loads(json.dumps(delta.header.as_json())) == read_metadata(path)


def test_fields_of_a_later_version_are_kept_and_its_format_is_refused(tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    base = model()
    save(first, difference(base, edited(base), PROVENANCE))
    header = read_metadata(first) | {"licence": {"name": "MIT"}}
    write_tensors(first, read_tensors(first), header)
    delta = load(first)
    assert delta.header.more == {"licence": {"name": "MIT"}}
    save(second, delta)
    assert second.read_bytes() == first.read_bytes()
    write_tensors(first, read_tensors(first), header | {"format": "erase delta 2"})
    with pytest.raises(EraseError, match="has delta format 2, which a later version wrote; this one reads up to 1"):
        load(first)


def test_patterns_are_compared_so_signed_zeros_nans_and_infinities_survive():
    values = [0.0, -0.0, math.nan, math.inf, 1e-45, 1.0, math.nan]
    base = {"w": torch.tensor(values)}
    new = {"w": torch.tensor([-0.0, 0.0, 1.0, -math.inf, 0.0, math.nan, math.nan])}
    delta = difference(base, new)
    assert delta.changed == {"w": 6}  # all but the last NaN, which kept its bits; `!=` on values would find 5 others
    assert same_bits(apply(base, delta), new)
    assert same_bits(remove(new, delta), base)


def test_an_additive_sum_would_not_restore_the_new_model():
    """Control for the XOR: base + (new - base) is not new in floating point."""
    base, new = torch.tensor([1e8, 1.0]), torch.tensor([1.0, 1e-9])
    assert not torch.equal(base + (new - base), new)
    assert torch.equal(apply({"w": base}, difference({"w": base}, {"w": new}))["w"], new)


def test_unchanged_tensors_are_absent_and_unchanged_weights_cost_one_bit():
    base = model()
    assert difference(base, model()).tensors == {}
    delta = difference(base, edited(base))
    assert delta.changed.keys() == {"unet.attn2.to_k.weight", "scale"}
    assert delta.tensors["unet.attn2.to_k.weight.bitmap"].shape == (8,)
    assert delta.tensors["unet.attn2.to_k.weight.values"].shape == (delta.changed["unet.attn2.to_k.weight"],)
    assert 0 < delta.changed["unet.attn2.to_k.weight"] < 64


def test_a_delta_refuses_any_other_model_and_names_both_hashes():
    base = model()
    new = edited(base)
    delta = difference(base, new, PROVENANCE)
    other = base | {"steps": torch.tensor([8])}  # a tensor that the delta does not even touch
    here, before, after = (content_hash(state)[:12] for state in (other, base, new))
    with pytest.raises(EraseError, match=f"this model is {here}, but .*for sd14, can be applied to {before} only"):
        apply(other, delta)
    with pytest.raises(EraseError, match=f"can be removed from {after} only"):
        remove(other, delta)
    with pytest.raises(EraseError, match=f"{after}, to which the delta, .*, is already applied"):
        apply(new, delta)
    with pytest.raises(EraseError, match=f"{before}, the base model of the delta, .*: there is nothing to remove"):
        remove(base, delta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn2.to_k.weight": torch.zeros(8, 8)}, "'attn2.to_k.weight' has 64 weights here but 16 in the delta"),
        ({"attn2.to_k.weight": torch.zeros(2, 8)}, r"has the shape \[2, 8\] here but \[4, 4\] in the delta, which was"),
        ({"attn2.to_k.weight": torch.zeros(4, 4).half()}, "is float16 here but float32 in the delta.*made for sd14"),
        ({"extra": torch.zeros(1)}, "'extra' is here but not in the delta"),
    ],
)
def test_a_model_of_another_form_is_named_tensor_by_tensor(change, message):
    base = {"attn2.to_k.weight": torch.zeros(4, 4), "bias": torch.zeros(4)}
    delta = difference(base, {**base, "bias": torch.ones(4)}, PROVENANCE)
    apply(base, delta)  # control
    with pytest.raises(EraseError, match=message):
        apply(base | change, delta)
    with pytest.raises(EraseError, match=message.split(" in the delta")[0]):
        difference(base, base | change)
    with pytest.raises(EraseError, match="'bias' is missing here"):
        apply({"attn2.to_k.weight": base["attn2.to_k.weight"]}, delta)


def test_content_hash_depends_on_content_alone():
    base = model()
    reference = content_hash(base)
    assert content_hash(dict(reversed(base.items()))) == reference
    strided = base["unet.attn2.to_k.weight"].t().contiguous().t()
    assert not strided.is_contiguous()
    assert content_hash(base | {"unet.attn2.to_k.weight": strided}) == reference
    assert content_hash(base | {"scale": torch.nn.Parameter(base["scale"])}) == reference
    different = [
        base | {"scale": torch.tensor(1.5000001)},
        base | {"scale": base["scale"].reshape(1)},
        base | {"empty": torch.zeros(0, 2)},
        {name + "_": tensor for name, tensor in base.items()},
        {name: tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor for name, tensor in base.items()},
    ]
    assert len({reference, *map(content_hash, different)}) == 1 + len(different)


def test_the_content_hash_of_a_known_state_never_changes():
    """Hashes live in files that people keep: SHA-256 of '["w", "float32", [2]]' and the bytes of 1.0 and 2.0."""
    import hashlib
    import struct

    expected = hashlib.sha256(b'["w", "float32", [2]]' + struct.pack("<ff", 1, 2)).hexdigest()
    assert content_hash({"w": torch.tensor([1.0, 2.0])}) == expected


def test_the_same_delta_gives_the_same_bytes(tmp_path):
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file, order in zip(files, (list, reversed, list), strict=True):
        base = dict(order(list(model().items())))
        provenance = dict(order(list(PROVENANCE.items())))
        save(file, difference(base, edited(base), provenance))
    save(files[2], difference(model(), edited(model(), seed=2), PROVENANCE))  # control
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "delta.safetensors"
    save(path, difference(model(), edited(model()), PROVENANCE))
    header, tensors = read_metadata(path), read_tensors(path)
    load(path)  # control
    key = "unet.attn2.to_k.weight"

    def damaged(**changes: torch.Tensor | None):
        kept = tensors | {f"{key}.{part}": tensor for part, tensor in changes.items()}
        write_tensors(path, {name: tensor for name, tensor in kept.items() if tensor is not None}, header)
        return load(path)

    with pytest.raises(EraseError, match=f"damaged: '{key}' marks .* changed weights but has 1 values"):
        damaged(values=tensors[f"{key}.values"][:1])
    with pytest.raises(EraseError, match="bitmap of 7 bytes for 64 weights"):
        damaged(bitmap=tensors[f"{key}.bitmap"][:7])
    with pytest.raises(EraseError, match="is float32 but its values are int16"):
        damaged(values=tensors[f"{key}.values"].to(torch.int16))
    with pytest.raises(EraseError, match="a bitmap or values, but not both"):
        damaged(values=None)
    flipped = damaged(values=tensors[f"{key}.values"] ^ 1)  # consistent, but not what was saved
    with pytest.raises(EraseError, match="damaged: it gives .* instead of"):
        apply(model(), flipped)
    write_tensors(path, tensors | {"stray.bitmap": torch.zeros(1), "stray.values": torch.zeros(0)}, header)
    with pytest.raises(EraseError, match="does not describe 'stray'"):
        load(path)
    save_file(tensors, path)
    with pytest.raises(EraseError, match="is not a delta"):
        load(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(EraseError, match="not a whole safetensors file"):
        load(path)
    with pytest.raises(EraseError, match="no such file"):
        load(tmp_path / "none.safetensors")


def test_summary_counts_changed_and_all_weights_of_each_block():
    base = model()
    new = base | {"unet.norm.bias": base["unet.norm.bias"] + 1}
    table = summary(difference(base, new), lambda name: name.split(".")[0])
    assert table == {"unet": (13, 4 * 27 + 64 + 13), "scale": (0, 1), "steps": (0, 1), "empty": (0, 0)}


def test_results_share_the_memory_of_what_did_not_change():
    base = model()
    applied = apply(base, difference(base, edited(base)))
    assert applied["unet.conv_in.weight"] is base["unet.conv_in.weight"]
    assert applied["scale"] is not base["scale"]
