"""Device and precision: chosen in one place, under either name of the option, and refused in one clear line."""

from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pretend_device
import pytest
import torch
from loaded import load_sd

from erase import cli, device
from erase.classification import cli as classifier_cli
from erase.classification.settings import Settings as ClassifierSettings
from erase.errors import EraseError
from erase.evaluation import cli as evaluation_cli
from erase.options import declare
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.runs import machine, planning
from erase.training import saliency_pass


def test_without_a_gpu_it_is_the_cpu_in_fp32():
    with mock.patch.object(device, "num_gpus", lambda: 0):
        found = device.choose(None, None)
    assert (found.device, found.precision) == (torch.device("cpu"), "fp32")
    assert device.choose("cpu", "bf16").precision == "bf16"


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_on_a_gpu_it_is_bf16_or_fp16_where_the_card_lacks_it_and_fp32_on_request(has_bf16, precision):
    """(1.2)"""
    with pretend_device.gpu(has_bf16=has_bf16):
        found = device.choose(None, None)
        assert (found.device, found.precision) == (torch.device("cuda", 0), precision)
        assert device.choose("cuda", "fp32").precision == "fp32"
        assert device.choose("cpu", None).precision == "fp32"


@pytest.mark.parametrize("deterministic", [False, True])
def test_tf32_is_allowed_unless_deterministic_algorithms_are_asked_for(monkeypatch, deterministic):
    """(1.2)"""
    backends: Any = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    try:
        with pretend_device.gpu():
            device.choose(None, None)
        assert [backend.allow_tf32 for backend in backends] == [not deterministic] * 2
    finally:
        for backend, was_allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = was_allowed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x", "--device is 'x'; choose cpu, cuda, cuda:N or mps"),
        ("cuda:x", "choose cpu, cuda, cuda:N or mps"),
        ("cuda:", "choose cpu, cuda, cuda:N or mps"),
        ("cpu:0", "choose cpu, cuda, cuda:N or mps"),
        ("cuda:1", "torch sees 1 CUDA devices, numbered from 0"),
    ],
)
def test_a_device_that_is_not_there_is_one_clear_line(name, message):
    """(1.6)"""
    with pretend_device.gpu(), pytest.raises(EraseError, match=message):
        device.choose(name, None)


def test_without_a_gpu_cuda_is_refused_and_without_an_apple_gpu_mps(monkeypatch):
    """(1.6)"""
    monkeypatch.setattr(device, "num_gpus", lambda: 0)
    with pytest.raises(EraseError, match="torch sees no CUDA device; use --device cpu"):
        device.choose("cuda", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(EraseError, match="torch sees no Apple GPU"):
        device.choose("mps", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.choose("mps", None) == device.Compute(torch.device("mps"), "fp32")


@pytest.mark.parametrize("command", [cli.main, evaluation_cli.main, classifier_cli.main])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "x"], "--device is 'x'; choose cpu, cuda, cuda:N or mps"),
        (["--precision", "fp8"], "--precision is 'fp8'"),
        (["--mixed-precision", "fp32"], "--mixed-precision is 'fp32'; choose no, fp16, bf16"),
        (["--precision", "fp32", "--mixed-precision", "bf16"], "they mean the same, leave one out"),
    ],
)
def test_every_command_refuses_the_same_values(command, flags, message, toy_pipeline_dir, tmp_path, capsys):
    """(1.2)"""
    own = {
        cli.main: ["--concept", "circle", "--model", "mini"],
        evaluation_cli.main: ["generate", "--model", "mini", "--concept", "circle", "--task", "mini"],
        classifier_cli.main: ["--data", "digits"],
    }[command]
    with pytest.raises(SystemExit) as stopped:
        command([*own, "--output", str(tmp_path / "out"), *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_judging_refuses_a_device_that_is_not_there_too(tmp_path, capsys):
    """(1.6)"""
    with pytest.raises(SystemExit) as stopped:
        evaluation_cli.main(["score", str(tmp_path), "--judge", "mini", "--device", "x"])
    assert stopped.value.code == 2 and "--device is 'x'; choose cpu, cuda" in capsys.readouterr().err


@pytest.mark.parametrize("options", [Settings, ClassifierSettings])
def test_mixed_precision_is_another_name_for_precision(options):
    """(1.2)"""
    what: dict[str, Any] = {"concept": "church"} if options is Settings else {}
    assert options(**what, mixed_precision="no") == options(**what, precision="fp32")
    assert options(**what, mixed_precision="bf16", precision="bf16").precision == "bf16"
    assert replace(options(**what, mixed_precision="fp16"), seed=1).precision == "fp16"
    with pytest.raises(EraseError, match="--precision is fp32 but --mixed-precision bf16"):
        options(**what, precision="fp32", mixed_precision="bf16")


def test_fp16_gives_way_to_fp32_where_gradients_are_compared_unless_it_is_asked_for():
    """(1.2)"""
    for method, compares in (("salun", False), ("scissorhands", True), ("uce", False)):
        asked = Settings("church", method=method, precision="fp16")
        made = planning.make_method(asked)
        assert planning.can_scale(asked, made) is not compares
        if compares:
            with pytest.raises(EraseError, match="scissorhands compares gradients, which --precision fp16 scales"):
                planning.require_precision(asked, made)


def test_processes_wait_for_slower_ones_for_hours(tmp_path, monkeypatch):
    """(1.6)"""
    given: dict[str, Any] = {}
    plain = machine.Accelerator
    monkeypatch.setattr(machine, "Accelerator", lambda **options: given.update(options) or plain(**options))
    machine.make_accelerator(Settings("church"), tmp_path, device.choose("cpu", None))
    handlers = {type(handler).__name__: handler for handler in given["kwargs_handlers"]}
    assert handlers["InitProcessGroupKwargs"].timeout >= timedelta(hours=12)


# --- sampler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "own", "expected"),
    [
        ({}, {}, ("dpm++", 20)),
        ({"recipe": "paper"}, {}, ("model", 50)),
        ({"recipe": "reference"}, {}, ("model", 50)),
        ({"sampler": "model"}, {}, ("model", 50)),
        ({"num_inference_steps": 30}, {}, ("dpm++", 30)),
        ({"recipe": "paper", "sampler": "dpm++"}, {}, ("dpm++", 20)),
        ({}, {"num_inference_steps": 25}, ("model", 25)),  # the embedded model's own
        ({"sampler": "dpm++", "num_inference_steps": 10}, {"num_inference_steps": 25}, ("dpm++", 10)),
        ({}, {"sampler": "model"}, ("model", 50)),
    ],
)
def test_the_default_recipe_generates_with_dpm_and_the_users_and_the_models_word_count_more(options, own, expected):
    """(1.2)"""
    found = resolve(Settings("church", **options), "object", own)
    assert (found.sampler, found.num_inference_steps) == expected


def test_trajectories_keep_their_papers_fifty_steps():
    for method in ("esd-x", "esd-strict", "esd-u", "esd-full", "leco", "sdd"):
        assert resolve(Settings("church", method=method), "object", {}).num_inference_steps == 50, method


# --- precision of a network -------------------------------------------------------------------------------------------


def test_rounding_is_undone_bit_for_bit_also_after_an_error():
    layer = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(KeyError), device.rounded("bf16", layer):
        assert layer.weight.dtype == torch.bfloat16
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_images_in_half_precision_are_near_those_in_float32(toy_pipeline_dir, precision):
    """To a few units of the precision's last place, relative to the largest value."""
    model = load_sd(toy_pipeline_dir)
    how: dict[str, Any] = dict(steps=2, guidance=2.0, size=8)
    exact = model.draw(["a cat"], [0], **how)
    model.precision = precision
    near = model.draw(["a cat"], [0], **how)
    assert near.dtype == torch.float32 and not torch.equal(near, exact)
    assert (near - exact).abs().max() < {"bf16": 0.1, "fp16": 0.01}[precision] * exact.abs().max()
    assert model.decode(near).dtype == torch.float32 and model.unet.dtype == torch.float32
    assert "forward" not in vars(model.unet)


def test_a_process_may_run_on_a_gpu_and_then_on_a_cpu(tmp_path):
    """accelerate keeps the device of the first run unless it is told to forget it. (1.1)"""
    settings = Settings("church")
    with pretend_device.gpu():
        assert machine.make_accelerator(settings, tmp_path, device.choose("cuda", None)).device.type == "cuda"
    accelerator = machine.make_accelerator(settings, tmp_path, device.choose("cpu", "bf16"))
    assert accelerator.device.type == "cpu"
    with accelerator.autocast():
        assert torch.is_autocast_enabled("cpu")


def test_autocast_keeps_no_rounded_weights(tmp_path):
    """torch 2.6 would give those of a pass without gradients to the next pass, and find no gradient there."""
    compute = device.choose("cpu", "bf16")
    for inside in (compute.autocast(), machine.make_accelerator(Settings("church"), tmp_path, compute).autocast()):
        layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
        with inside:
            assert not torch.is_autocast_cache_enabled()
            with torch.no_grad():
                layer(x)
            assert layer(x).dtype == torch.bfloat16 and layer(x).requires_grad


def test_fp16_gradients_of_the_mask_do_not_vanish():
    """Halves below 6e-8 are zero; the scale lifts them by 12 bits."""
    assert torch.tensor(1e-8, dtype=torch.float16) == 0
    assert torch.tensor(1e-8 * device.LOSS_SCALE["fp16"], dtype=torch.float16) > 0
    assert saliency_pass.LOSS_SCALE is device.LOSS_SCALE and declare.MIXED_PRECISION["no"] == "fp32"


def test_help_of_every_command_names_both_options(capsys):
    for command, own in ((cli.main, []), (evaluation_cli.main, ["run"]), (classifier_cli.main, [])):
        with pytest.raises(SystemExit):
            command([*own, "--help"])
        text = capsys.readouterr().out
        assert "--precision" in text and "--mixed-precision {no,fp16,bf16}" in text


@pytest.mark.parametrize(("share", "expected"), [(1.0, 50), (0.5, 40), (None, 50)])
def test_free_memory_counts_what_this_process_may_still_take(monkeypatch, share, expected):
    """100 bytes, 40 free, 20 of the process of which 10 are in use; with half of the card it may take 30 more."""
    where = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    if share is None:  # an older torch
        monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction", raising=False)
    else:
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share, raising=False)
    assert device.free_memory(where) == expected
    assert device.free_memory(torch.device("cpu")) == 0
