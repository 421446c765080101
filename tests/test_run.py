"""The whole job on a toy pipeline: what a run folder holds, and how runs are continued, refused, applied and undone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from safetensors.torch import load_file, save_file

from erase import cli, concepts, delta, erase_concept, files, masks, tensor_files
from erase.concepts import Concept
from erase.data import latents
from erase.errors import EraseError
from erase.families import loading, stored_unet
from erase.methods.relabel import Relabel
from erase.options.settings import Settings
from erase.runs import folders, job, machine, subjects
from erase.runs import record as run_json
from erase.runs.record import Started
from erase.training import loop

CONCEPT = Concept(
    "cat",
    "object",
    forget=("a cat", "a photo of a cat"),
    anchor=("a dog", "a photo of a dog"),
    retain=("a tree", "a boat", "a house"),
    others=("a bird", "a car"),
)
OPTIONS = {
    "num_forget": 4,
    "num_retain": 4,
    "num_inference_steps": 2,
    "num_train_steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "checkpointing_steps": 1,
    "num_samples": 2,
    "generation_batch_size": 2,
    "device": "cpu",
    "quiet": True,
}
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in OPTIONS.items() if k != "quiet"]


def erase(model: Path, output: Path, **options):
    return erase_concept(CONCEPT, str(model), output=str(output), **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def finished(toy_pipeline_dir, tmp_path_factory):
    """One finished run, to look at only."""
    os.environ["ERASE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return erase(toy_pipeline_dir, tmp_path_factory.mktemp("run") / "cat")


def test_a_run_folder_holds_what_it_promises(finished, toy_pipeline_dir):
    names = {path.name for path in finished.folder.iterdir()}
    assert {"model_index.json", "unet", "delta.safetensors", "mask.safetensors", "run.json", "README.md"} <= names
    assert "samples.png" in names and "work" not in names
    record = json.loads((finished.folder / "run.json").read_text())
    assert record == finished.record.as_json()
    assert record["status"] == "done" and len(record["losses"]) == 4
    for name, digest in record["files"].items():
        assert files.file_hash(finished.folder / name) == digest, name
    mask, header = masks.load(finished.folder / "mask.safetensors")
    assert masks.count(mask) == int(header.total * 0.5) == record["mask"]["ones"]
    assert header.made["base_hash"] == record["model"]["base_hash"]
    for path in toy_pipeline_dir.rglob("*"):  # untouched parts are the base's bytes
        if path.is_file() and "diffusion_pytorch_model" not in path.name or "vae" in path.parts:
            if path.is_file():
                assert path.read_bytes() == (finished.folder / path.relative_to(toy_pipeline_dir)).read_bytes()


def test_only_masked_weights_differ_from_the_base(finished, toy_pipeline_dir):
    mask, _ = masks.load(finished.folder / "mask.safetensors")
    base = stored_unet.load_unet(toy_pipeline_dir).state_dict()
    erased = stored_unet.load_unet(finished.folder).state_dict()
    changed = {name: base[name].view(torch.int32) != erased[name].view(torch.int32) for name in base}
    assert sum(int(c.sum()) for c in changed.values()) == finished.record.weights.changed > 0
    assert not any((changed[name] & ~mask[name]).any() for name in base)


def test_a_fresh_process_without_erase_loads_the_folder_and_predicts_the_same(finished, tmp_path):
    """Law 6."""
    unet = stored_unet.load_unet(finished.folder)
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([5, 800]), torch.randn(2, 77, 8)
    with torch.no_grad():
        tensor_files.write_tensors(tmp_path / "io.safetensors", {"x": x, "t": t, "c": c, "y": unet(x, t, c).sample})
    script = """
import sys, torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
torch.set_num_threads(1)
io = load_file(sys.argv[2])
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
with torch.no_grad():
    y = pipeline.unet(io["x"], io["t"], io["c"]).sample
assert "erase" not in sys.modules
print(torch.equal(y, io["y"]), len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size)
"""
    command = [sys.executable, "-c", script, str(finished.folder), str(tmp_path / "io.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_the_same_call_returns_the_finished_record_and_other_settings_are_refused(finished, toy_pipeline_dir):
    before = (finished.folder / "run.json").stat().st_mtime_ns
    assert erase(toy_pipeline_dir, finished.folder).record == finished.record
    with pytest.raises(EraseError, match=r"holds another run \(it differs in --density, --seed\)"):
        erase(toy_pipeline_dir, finished.folder, density=0.1, seed=3)
    assert (finished.folder / "run.json").stat().st_mtime_ns == before


def copied(finished, tmp_path) -> Path:
    """The finished run in a folder of the same name, to be altered."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy" / "cat"))


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "delta.safetensors", "model_index.json"])
@pytest.mark.parametrize("how", ["missing", "altered"])
def test_a_finished_run_is_verified_before_it_is_believed(finished, toy_pipeline_dir, tmp_path, name, how):
    """(2.3)"""
    folder = copied(finished, tmp_path)
    assert not erase(toy_pipeline_dir, folder).is_new  # control
    if how == "missing":
        (folder / name).unlink()
    else:
        content = bytearray((folder / name).read_bytes())
        content[-9] ^= 1
        (folder / name).write_bytes(content)
    told = f"cat holds a run that was finished on 20.* UTC, but {name} (is missing|was altered); bring .*--overwrite"
    with pytest.raises(EraseError, match=told):
        erase(toy_pipeline_dir, folder)


@pytest.mark.parametrize("change", [{"finished": "yesterday"}, {"finished": None}, {"files": {}}])
def test_a_record_whose_time_or_files_cannot_be_right_is_damaged(finished, toy_pipeline_dir, tmp_path, change):
    """A record without files would make any content of the folder "verified" (2.3)."""
    folder = copied(finished, tmp_path)
    record = files.read_json(folder / "run.json")
    files.write_json(folder / "run.json", {**record, **change})
    with pytest.raises(EraseError, match=r"run\.json is damaged: .* choose another --output"):
        erase(toy_pipeline_dir, folder)


def test_texts_and_samples_of_a_finished_run_may_be_edited(finished, toy_pipeline_dir, tmp_path):
    folder = copied(finished, tmp_path)
    (folder / "README.md").write_text("my own card")
    (folder / "samples.png").unlink()
    assert not erase(toy_pipeline_dir, folder).is_new


def test_a_finished_run_says_when_it_was_made(finished, toy_pipeline_dir, tmp_path, capsys):
    """And not that it was erased in so many seconds (2.3)."""
    folder = copied(finished, tmp_path)
    made = files.read_json(folder / "run.json")["finished"]
    cli.main(["--concept", concept_file(tmp_path), "--model", str(toy_pipeline_dir), "--output", str(folder), *FLAGS])
    out = capsys.readouterr().out
    assert f"already finished on {made[:10]} {made[11:16]} UTC" in out and "erased from" not in out


def concept_file(tmp_path: Path) -> str:
    path = tmp_path / "cat.toml"
    keys = ("forget", "anchor", "retain", "others")
    path.write_text('kind = "object"\n' + "\n".join(f"{key} = {json.dumps(getattr(CONCEPT, key))}" for key in keys))
    return str(path)


def test_what_does_not_decide_the_weights_makes_no_other_run(finished, toy_pipeline_dir, tmp_path):
    """Synonyms, a judge, another number of samples or a name of the concept (2.8)."""
    folder = copied(finished, tmp_path)
    judge = {"type": "clip", "target": "a cat", "alternatives": ["a dog"]}
    same = replace(CONCEPT, name="kitten", synonyms=("puss",), judge=judge)
    options = {**OPTIONS, "num_samples": 0, "checkpointing_steps": 7}
    again = erase_concept(same, str(toy_pipeline_dir), output=str(folder), **options)
    assert not again.is_new and again.record.finished == finished.record.finished
    with pytest.raises(EraseError, match="differs in concept"):
        erase_concept(replace(CONCEPT, retain=("a tree",)), str(toy_pipeline_dir), output=str(folder), **OPTIONS)


def test_a_form_asked_for_later_is_added(finished, toy_pipeline_dir, tmp_path, capsys):
    """`--save` of a finished run, and `export`, which gives the same bytes however often (2.8)."""
    folder = copied(finished, tmp_path)
    again = erase(toy_pipeline_dir, folder, save=("lora",), lora_rank=2)
    assert again.added == ("lora",) and not again.is_new
    lora = files.file_hash(folder / "pytorch_lora_weights.safetensors")
    assert again.record.files["pytorch_lora_weights.safetensors"] == lora
    assert again.record.finished == finished.record.finished
    cli.main(["export", str(folder), "--to", "unet", "--to", "lora", "--lora-rank", "2", "--to", "single-file"])
    out = capsys.readouterr().out
    assert f"{folder / 'unet.safetensors'}: written (unet)" in out and f"{folder / 'cat.safetensors'}: written" in out
    record = files.read_json(folder / "run.json")
    assert {"unet.safetensors", "cat.safetensors", "model_index.json"} <= record["files"].keys()
    assert all(files.file_hash(folder / name) == digest for name, digest in record["files"].items())
    assert record["files"]["pytorch_lora_weights.safetensors"] == lora
    unet = stored_unet.load_unet(folder).state_dict()
    assert tensor_files.content_hash(
        tensor_files.read_tensors(folder / "unet.safetensors")
    ) == tensor_files.content_hash(unet)
    erase(toy_pipeline_dir, folder)  # verified


def test_a_run_saved_without_its_pipeline_is_exported_as_one(finished, toy_pipeline_dir, tmp_path):
    folder = erase(toy_pipeline_dir, tmp_path / "cat", save=("delta",), num_samples=0).folder
    assert not (folder / "model_index.json").exists()
    cli.main(["export", str(folder), "--to", "pipeline", "--output", str(tmp_path / "elsewhere")])
    assert "model_index.json" not in files.read_json(folder / "run.json")["files"]
    cli.main(["export", str(folder), "--to", "pipeline"])
    for made in (folder, tmp_path / "elsewhere"):
        name = "unet/diffusion_pytorch_model.safetensors"
        assert files.file_hash(made / name) == files.file_hash(finished.folder / name)
    assert "model_index.json" in files.read_json(folder / "run.json")["files"]


def test_export_wants_a_finished_whole_run(finished, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    altered = copied(finished, tmp_path)
    (altered / "delta.safetensors").unlink()
    unfinished = tmp_path / "unfinished"
    run_json.write(unfinished / "run.json", Started(finished.record.identity))
    for folder, told in ((tmp_path / "empty", "not a run folder"), (altered, "delta.safetensors is missing")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["export", str(folder), "--to", "unet"])
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", str(unfinished), "--to", "unet"])
    assert "unfinished run; repeat its command" in capsys.readouterr().err


def old_record(finished) -> dict[str, Any]:
    """What version 0.1.0 wrote for the very run, with today's hashes of the files."""
    old = json.loads((Path(__file__).parent / "old" / "run-0.1.0.json").read_text())
    new = finished.record.as_json()
    old["files"], old["model"] = new["files"], new["model"]
    old["identity"]["base_hash"] = new["identity"]["base_hash"]
    return old


def test_a_finished_run_of_version_0_1_0_is_the_same_run(finished, toy_pipeline_dir, tmp_path):
    """Its record lacks a format, a time, and whatever options came later (2.8).

    It generated with the model's own scheduler, as a run of today does when it is asked to.
    """
    folder = copied(finished, tmp_path)
    (folder / "run.json").write_text(json.dumps(old_record(finished)))
    again = erase(toy_pipeline_dir, folder, sampler="model")
    assert not again.is_new and folders.when(again.record) == ""
    with pytest.raises(EraseError, match=r"holds another run \(it differs in --density, --precision, --seed\)"):
        erase(toy_pipeline_dir, folder, density=0.1, seed=3, precision="bf16", sampler="model")
    with pytest.raises(EraseError, match="differs in concept"):
        erase_concept(replace(CONCEPT, forget=("cats",) * 2), str(toy_pipeline_dir), output=str(folder), **OPTIONS)


def test_a_record_that_lacks_a_setting_was_made_with_its_default(finished, toy_pipeline_dir, tmp_path):
    """What a later version's new option needs (2.8)."""
    folder = copied(finished, tmp_path)
    record = files.read_json(folder / "run.json")
    for name in ("moments", "score", "attention", "weights"):
        del record["identity"]["settings"][name]
    files.write_json(folder / "run.json", record)
    assert not erase(toy_pipeline_dir, folder).is_new
    with pytest.raises(EraseError, match=r"differs in --score\)"):
        erase(toy_pipeline_dir, folder, score="sum_sq")


RECORDS = {
    "text": lambda record: "hello",
    "list": lambda record: "[]",
    "null": lambda record: "null",
    "half": lambda record: json.dumps(record)[:1000],
    "no status": lambda record: json.dumps({**record, "status": "?"}),
    "no identity": lambda record: json.dumps({**record, "identity": 3}),
    "later format": lambda record: json.dumps({**record, "format": 9}),
    "no format": lambda record: json.dumps({**record, "identity": {"settings": 1}}),
    "no settings": lambda record: json.dumps({**record, "identity": {**record["identity"], "settings": []}}),
    "no files": lambda record: json.dumps({**record, "files": None}),
    "numbers for hashes": lambda record: json.dumps({**record, "files": {"a": 1}}),
    "no model": lambda record: json.dumps({key: value for key, value in record.items() if key != "model"}),
    "no weights": lambda record: json.dumps({**record, "weights": {}}),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_is_one_line(kind, finished, toy_pipeline_dir, tmp_path):
    """(4.10)"""
    folder = tmp_path / "cat"
    folder.mkdir()
    (folder / "run.json").write_text(RECORDS[kind](finished.record.as_json()))
    with pytest.raises(EraseError, match="run.json") as caught:
        erase(toy_pipeline_dir, folder)
    assert "\n" not in str(caught.value) and [path.name for path in folder.iterdir()] == ["run.json"]


def test_same_seed_same_delta_and_another_seed_another(finished, toy_pipeline_dir, tmp_path):
    """Law 4, from nothing: the cache is empty."""
    digest = files.file_hash(finished.folder / "delta.safetensors")
    again = erase(toy_pipeline_dir, finished.folder.parent / "again" / "cat", cache_dir=str(tmp_path / "fresh"))
    assert files.file_hash(again.folder / "delta.safetensors") == digest
    other = erase(toy_pipeline_dir, tmp_path / "other", seed=1)
    assert other.record.model.result_hash != finished.record.model.result_hash


@pytest.mark.parametrize("mask", ["random", "inverse", "none"])
def test_controls_run_and_differ_from_the_salient_mask(finished, toy_pipeline_dir, tmp_path, mask):
    record = erase(toy_pipeline_dir, tmp_path / mask, mask=mask, num_samples=0).record
    assert record.model.result_hash != finished.record.model.result_hash
    if mask == "none":
        assert record.mask is None and not (tmp_path / mask / "mask.safetensors").exists()
        assert record.weights.changed > finished.record.weights.changed
    else:
        assert record.mask == finished.record.mask
        mine = masks.load(tmp_path / mask / "mask.safetensors")[0]
        assert masks.iou(mine, masks.load(finished.folder / "mask.safetensors")[0]) < 0.5


def test_a_mask_file_gives_the_run_that_made_it(finished, toy_pipeline_dir, tmp_path):
    path = str(finished.folder / "mask.safetensors")
    again = erase(toy_pipeline_dir, tmp_path / "run", mask=path, num_samples=0)
    assert again.record.model.result_hash == finished.record.model.result_hash


def test_the_references_mask_layout_is_read_and_another_scopes_mask_refused(tiny_pipeline_dir, tmp_path):
    from erase.families import compvis

    unet = stored_unet.load_unet(tiny_pipeline_dir)
    mask = masks.random_mask({name: p.shape for name, p in unet.named_parameters()}, 0.2, seed=0)
    names = compvis.unet_names(unet.state_dict(), unet.config)  # pyright: ignore
    masks.save_reference(tmp_path / "with_0.2.pt", mask, names.__getitem__)
    options = {"mask": str(tmp_path / "with_0.2.pt"), "num_samples": 0, "save": ("delta",), "num_train_steps": 1}
    record = erase(tiny_pipeline_dir, tmp_path / "run", **options).record
    assert record.mask and record.mask.ones == masks.count(mask)
    assert 0 < record.weights.changed <= masks.count(mask)
    partial = {name: bits for name, bits in mask.items() if ".attn2." in name}
    masks.save(tmp_path / "partial.safetensors", partial, {})
    with pytest.raises(EraseError, match="has no entry for .* made for another --scope"):
        erase(tiny_pipeline_dir, tmp_path / "refused", mask=str(tmp_path / "partial.safetensors"))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("recipe", ["paper", "reference"])
def test_the_other_recipes_run(finished, toy_pipeline_dir, tmp_path, recipe):
    record = erase(toy_pipeline_dir, tmp_path / recipe, recipe=recipe, num_samples=0).record
    assert record.settings["alpha"] == 0.5 and record.settings["target"] == "fixed"
    assert record.settings["mask_guidance"] == (7.5 if recipe == "reference" else 0.0)
    assert record.model.result_hash != finished.record.model.result_hash


def test_apply_and_remove_restore_each_other_from_the_shell(finished, toy_pipeline_dir, tmp_path, capsys):
    """Law 5."""
    change = str(finished.folder / "delta.safetensors")
    cli.main(["apply", "--delta", change, "--model", str(toy_pipeline_dir), "--output", str(tmp_path / "erased")])
    cli.main(["remove", "--delta", change, "--model", str(finished.folder), "--output", str(tmp_path / "base")])
    for ours, expected in (("erased", finished.folder), ("base", toy_pipeline_dir)):
        mine = stored_unet.load_unet(tmp_path / ours).state_dict()
        theirs = stored_unet.load_unet(expected).state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert "written" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["apply", "--delta", change, "--model", str(finished.folder), "--output", str(tmp_path / "no")])
    error = capsys.readouterr().err
    assert finished.record.model.result_hash[:12] in error and "already" in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_apply_and_remove_can_be_repeated(finished, toy_pipeline_dir, tmp_path, capsys):
    """The same command after it is done says so; a folder with anything else in it is refused (2.4)."""
    change = str(finished.folder / "delta.safetensors")
    command = ["apply", "--delta", change, "--model", str(toy_pipeline_dir), "--output", str(tmp_path / "out")]
    cli.main(command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    cli.main(command)
    assert "already written" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "out" / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert "out exists already" in capsys.readouterr().err


def test_apply_writes_to_no_link_and_copies_no_pickle_that_was_not_allowed(
    finished, toy_pipeline_dir, tmp_path, capsys
):
    """The result is a folder that users open without a flag (2.4, 2.5)."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(toy_pipeline_dir, base)
    weights = base / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    command = ["apply", "--delta", str(finished.folder / "delta.safetensors"), "--output", str(out)]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--model", str(base)])
    assert "text_encoder has no safetensors weights" in capsys.readouterr().err and not out.exists()
    (tmp_path / "elsewhere").mkdir()
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--model", str(toy_pipeline_dir)])
    assert "out is a link; remove it or choose another --output" in capsys.readouterr().err
    out.unlink()
    cli.main([*command, "--model", str(base), "--allow-pickle"])
    assert (out / "text_encoder" / "pytorch_model.bin").is_file()


def half_precision(folder: Path, target: Path) -> Path:
    """The pipeline with float16 weights, as many are published."""
    shutil.copytree(folder, target)
    for path in target.rglob("*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return target


def test_a_half_precision_base_comes_back_as_it_was_and_the_printed_line_generates(toy_pipeline_dir, tmp_path, capsys):
    """The UNet's tensors and dtype after `remove`, and the lines that the commands print, pasted (2.6, 2.7)."""
    base = half_precision(toy_pipeline_dir, tmp_path / "base")
    arguments = ["--concept", concept_file(tmp_path), "--model", str(base), "--output", str(tmp_path / "cat")]
    cli.main([*arguments, *FLAGS, "--num-samples=0", "--num-train-steps=1"])
    out = capsys.readouterr().out
    assert generates(out).unet.dtype == torch.float32
    assert "dtype=torch.float32" in (tmp_path / "cat" / "README.md").read_text()
    change = str(tmp_path / "cat" / "delta.safetensors")
    cli.main(["remove", "--delta", change, "--model", str(tmp_path / "cat"), "--output", str(tmp_path / "restored")])
    out = capsys.readouterr().out
    assert "equal to the base bit for bit" in out and generates(out)
    name = "unet/diffusion_pytorch_model.safetensors"
    restored, expected = load_file(tmp_path / "restored" / name), load_file(base / name)
    assert tensor_files.content_hash(restored) == tensor_files.content_hash(expected)
    assert {tensor.dtype for tensor in restored.values()} == {torch.float16}


def test_a_base_whose_dtype_is_not_known_comes_back_value_for_value(finished, toy_pipeline_dir, tmp_path, capsys):
    """As from a delta of version 0.1.0 (2.6)."""
    change = delta.load(finished.folder / "delta.safetensors")
    known = {name: value for name, value in change.provenance.items() if name != "base_dtype"}
    delta.save(tmp_path / "delta.safetensors", replace(change, header=replace(change.header, provenance=known)))
    arguments = ["--delta", str(tmp_path / "delta.safetensors"), "--model", str(finished.folder)]
    cli.main(["remove", *arguments, "--output", str(tmp_path / "restored")])
    assert "equal to the base in value" in capsys.readouterr().out


def generates(out: str) -> Any:
    """The pipeline of the line that was printed, after it generated an image."""
    line = re.search(r"^load it: (.*)$", out, re.MULTILINE)
    assert line
    names: dict[str, Any] = {}
    exec(line[1], names)
    pipeline = names["pipeline"]
    assert pipeline("a cat", num_inference_steps=1, output_type="np").images.shape[0] == 1
    return pipeline


def test_what_the_erased_model_predicts_is_what_its_file_predicts(finished, toy_pipeline_dir, tmp_path):
    """Law 6: the folder's UNet and the delta applied to the base predict the same bits, whatever file they lie in."""
    change = str(finished.folder / "delta.safetensors")
    cli.main(["apply", "--delta", change, "--model", str(toy_pipeline_dir), "--output", str(tmp_path / "again")])
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([5, 800]), torch.randn(2, 77, 8)
    with torch.no_grad():
        ours, theirs = (
            stored_unet.load_unet(folder)(x, t, c).sample for folder in (finished.folder, tmp_path / "again")
        )
    assert torch.equal(ours, theirs)


def test_a_weight_that_moved_outside_the_mask_is_never_published(finished, toy_pipeline_dir, tmp_path, monkeypatch):
    """Whatever moved it: here a training that was tampered with, its hashes in order (2.1)."""
    trained = loop.train

    def tampered(model, method, images, parameters, mask, *rest, **how):
        losses = trained(model, method, images, parameters, mask, *rest, **how)
        name = next(name for name, bits in mask.items() if not bits.all())
        with torch.no_grad():
            parameters[name].view(-1)[(~mask[name]).reshape(-1).nonzero()[0]] += 1.0
        return losses

    monkeypatch.setattr(loop, "train", tampered)
    with pytest.raises(EraseError, match="changed outside the mask or the scope; nothing was published"):
        erase(toy_pipeline_dir, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "work"} and files.read_json(tmp_path / "run" / "run.json")["status"] == "running"


def test_inspect_shows_the_share_of_every_block(finished, capsys):
    for name, word in (("delta", "changed"), ("mask", "may change")):
        cli.main(["inspect", str(finished.folder / f"{name}.safetensors")])
        out = capsys.readouterr().out
        assert word in out and "down_blocks.0 attn2" in out and "conv_in" in out
        assert "50.0%" in out.splitlines()[-1] if name == "mask" else "all" in out


def test_every_form_of_output_is_written(toy_pipeline_dir, tmp_path):
    pytest.importorskip("peft")
    folder = erase(toy_pipeline_dir, tmp_path / "all", save=("unet", "lora"), num_samples=0).folder
    unet = stored_unet.load_unet(toy_pipeline_dir).state_dict()
    assert tensor_files.read_tensors(folder / "unet.safetensors").keys() == unet.keys()
    assert (folder / "pytorch_lora_weights.safetensors").exists() and not (folder / "model_index.json").exists()


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_low_memory_says_first_what_it_needs_and_moves_no_bit_outside_the_mask(
    toy_pipeline_dir, tmp_path, monkeypatch, weights
):
    said: list[str] = []
    gather = latents.gather

    def gather_after_the_word(*arguments, **options):
        assert len(said) == 2
        return gather(*arguments, **options)

    monkeypatch.setattr(latents, "gather", gather_after_the_word)
    options: dict[str, Any] = {**OPTIONS, "output": str(tmp_path / "run"), "low_memory": True, "weights": weights}
    quiet = options.pop("quiet")
    settings = Settings("cat", str(toy_pipeline_dir), **options)
    record = job.run(settings, CONCEPT, quiet=quiet, tell=said.append).record
    assert re.fullmatch(
        r"needs about 0\.5 GB of memory \(generating 0\.5, mask 0\.5, training 0\.5, writing 0\.5\)", said[1]
    )
    assert record.settings["gradient_accumulation_steps"] == 1 and record.settings["gradient_checkpointing"]
    mask, _ = masks.load(tmp_path / "run" / "mask.safetensors")
    base, erased = (stored_unet.load_unet(folder).state_dict() for folder in (toy_pipeline_dir, tmp_path / "run"))
    moved = {name: base[name].view(torch.int32) != erased[name].view(torch.int32) for name in base}
    assert not any((moved[name] & ~mask[name]).any() for name in base)
    assert sum(int(m.sum()) for m in moved.values()) > 0.9 * masks.count(mask)


def test_losses_go_to_the_tracker_that_was_asked_for(toy_pipeline_dir, tmp_path):
    pytest.importorskip("tensorboard")
    folder = erase(toy_pipeline_dir, tmp_path / "run", report_to="tensorboard", num_samples=0, mask="none").folder
    assert list((folder / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(("name", "folder"), [("../../a/b", "_.._a_b"), ("AC/DC", "AC_DC")])
def test_a_name_with_slashes_is_one_folder_below_runs(name, folder, toy_pipeline_dir, tmp_path, monkeypatch):
    """Nothing is written outside runs/, and no folder inside a folder (2.10)."""
    here = tmp_path / "some" / "where"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    options = {"num_samples": 0, "save": ("delta",), "device": "cpu", "method": "uce", "kind": "object"}
    found = job.run(Settings(name, str(toy_pipeline_dir), **options), quiet=True)
    assert [path.relative_to(here) for path in here.rglob("run.json")] == [Path("runs", found.folder.name, "run.json")]
    assert found.folder.name == folder
    assert {path.name for path in tmp_path.iterdir()} <= {"some", "cache"}


def test_the_user_sees_what_becomes_what_before_the_work_begins(toy_pipeline_dir, tmp_path):
    """Forget -> anchor of each concept, as the method uses it (3.8)."""
    said: list[str] = []
    for number, (options, expected) in enumerate(
        [
            ({}, "cat: 'a cat' -> 'a dog' (and 1 more pair)"),
            ({"target": "fixed"}, "cat: 'a cat' (and 1 more prompt) -> 'a bird'"),
            ({"target": "random"}, "cat: 'a cat' (and 1 more prompt) -> a random one of 2 other classes"),
            ({"method": "ga"}, "cat: 'a cat' (and 1 more prompt) is unlearned; ga uses no anchor"),
        ]
    ):
        chosen = {**OPTIONS, "num_train_steps": 1, "num_samples": 0, "save": ("delta",), **options}
        del chosen["quiet"]
        settings = Settings("cat", str(toy_pipeline_dir), output=str(tmp_path / str(number)), **chosen)
        job.run(settings, CONCEPT, quiet=True, tell=said.append)
        assert said[-1] == expected
    described = concepts.describe("Taylor Swift", "object")
    line = subjects.announcement(described, Settings("Taylor Swift", kind="object"), Relabel())
    assert line.endswith("pairs); if Taylor Swift is a person, use --kind person; --anchor chooses another")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"concept": "church"},
            "the embedded model does not know 'church' (in the forget prompt 'an image of a church')",
        ),
        (
            {"concept": "red bicycle"},
            "does not know 'bicycle' (in --concept 'red bicycle'); it knows its presets only: checked, ",
        ),
        (
            {"concept": "red bicycle", "kind": "object"},
            "does not know 'bicycle' (in --concept 'red bicycle'); it knows its presets",
        ),
        ({"concept": "cirlce"}, "does not know 'cirlce' (in --concept 'cirlce'); did you mean circle? it knows"),
        ({"concept": "red disc", "kind": "object"}, "'red disc' is no preset of the embedded model; for free text"),
        ({"concept": "a nude girl", "kind": "object"}, "targets that involve minors"),
        (
            {"concept": "circle", "retain": ("a photo of a bicycle",)},
            "does not know 'bicycle' (in the retain prompt 'a photo of a bicycle')",
        ),
        (
            {"concept": "circle", "anchor": ("a potted plant",)},
            "'potted' (in the anchor prompt 'a potted plant'); give",
        ),
    ],
)
def test_what_the_embedded_model_was_never_shown_is_refused_by_name(options, message, tmp_path):
    """ "church" would be erased from a model that cannot generate one, without a word (3.8)."""
    with pytest.raises(EraseError, match=re.escape(message)):
        job.run(Settings(model="mini", output=str(tmp_path / "run"), **options), quiet=True)
    assert not (tmp_path / "run").exists()


def test_free_text_on_a_model_made_from_the_embedded_one_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "erase_defaults.json").write_text('{"family": "mini"}')
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(EraseError, match="does not know 'bicycle'"):
        job.run(Settings("red bicycle", str(tmp_path), kind="object", output=str(tmp_path / "run")), quiet=True)


def test_free_text_of_known_words_takes_prompts_of_your_own():
    own: Any = {"forget": ("a photo of a red disc",), "anchor": ("a photo of a red box",)}
    settings = Settings("red disc", "mini", kind="object", **own)
    assert subjects.find_concept(settings, "red disc", None, None).forget == own["forget"]


def test_a_prompt_whose_concept_is_cut_off_is_refused_and_a_long_one_is_said(toy_pipeline_dir, tmp_path):
    """The toy's tokenizer has a token for each letter and reads 75 of them (3.2)."""
    long = "a very detailed and rather long description of a quiet place in the evening with "
    assert len(long.replace(" ", "")) < 75 < len((long + long).replace(" ", ""))
    for forget, anchor in ((long + long + "a cat", "a dog"), (long + long + "a cat", long + long + "a dog")):
        hidden = replace(CONCEPT, forget=(forget,), anchor=(anchor,))
        with pytest.raises(
            EraseError, match=r"has \d+ tokens; the text encoder reads 75, and the concept comes after them"
        ):
            erase_concept(hidden, str(toy_pipeline_dir), output=str(tmp_path / "hidden"), **OPTIONS)
        assert not (tmp_path / "hidden").exists()
    said: list[str] = []
    shown = replace(CONCEPT, forget=("a cat in " + long + long,), anchor=("a dog",), retain=("a tree", long + long))
    options = {**OPTIONS, "num_train_steps": 1, "num_samples": 0, "save": ("delta",), "output": str(tmp_path / "run")}
    del options["quiet"]
    record = job.run(Settings("cat", str(toy_pipeline_dir), **options), shown, quiet=True, tell=said.append).record
    assert record.data["truncated_prompts"] == [shown.forget[0], shown.retain[1]]
    assert said[1].startswith("longer than the 77 tokens that the text encoder reads, and truncated: 'a cat in a very")
    assert said[1].endswith("and 1 more")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused_and_left_alone(toy_pipeline_dir, tmp_path):
    (tmp_path / "photo.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(EraseError, match="not a run folder"):
            erase(toy_pipeline_dir, tmp_path, overwrite=overwrite)
    assert (tmp_path / "photo.txt").read_text() == "mine"


def test_overwriting_deletes_what_a_run_made_and_nothing_else(finished, toy_pipeline_dir, tmp_path):
    """(2.12)"""
    folder = copied(finished, tmp_path)
    (folder / "notes.txt").write_text("mine")
    (folder / "unet" / "notes.txt").write_text("mine")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_text("mine")
    again = erase(toy_pipeline_dir, folder, overwrite=True, save=("delta",), num_samples=0)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    made = {"run.json", "README.md", "delta.safetensors", "mask.safetensors"}
    assert left == made | {"notes.txt", "unet/notes.txt", "photos/a.png"}
    assert again.record.files.keys() == made - {"run.json"}


@pytest.mark.parametrize("record", [{"results": 1}, {"status": "done", "name": "of another program"}, {}])
def test_a_folder_with_some_other_run_json_is_not_emptied(record, toy_pipeline_dir, tmp_path):
    """(2.12)"""
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "photo.txt").write_text("mine")
    with pytest.raises(EraseError, match="is not the record of an erasure"):
        erase(toy_pipeline_dir, tmp_path, overwrite=True)
    assert (tmp_path / "photo.txt").read_text() == "mine" and json.loads((tmp_path / "run.json").read_text()) == record


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_inside_an_unfinished_run_are_not_followed(overwrite, finished, toy_pipeline_dir, tmp_path):
    """A linked file is replaced, a linked folder is refused, and what they point to stays (2.12)."""
    folder, victim = tmp_path / "cat", tmp_path / "victim"
    (victim / "unet").mkdir(parents=True)
    (victim / "unet" / "diffusion_pytorch_model.bin").write_text("mine")
    (victim / "mask.safetensors").write_text("mine")
    outputs = ["unet/diffusion_pytorch_model.bin", "mask.safetensors"]
    run_json.write(folder / "run.json", Started(finished.record.identity, tuple(outputs)))
    (folder / "mask.safetensors").symlink_to(victim / "mask.safetensors")
    (folder / "unet").symlink_to(victim / "unet")
    with pytest.raises(EraseError, match="unet is a link to .*victim/unet; remove the link"):
        erase(toy_pipeline_dir, folder, overwrite=overwrite)
    (folder / "unet").unlink()
    erase(toy_pipeline_dir, folder, overwrite=overwrite, num_samples=0)
    assert (victim / "unet" / "diffusion_pytorch_model.bin").read_text() == "mine"
    assert (victim / "mask.safetensors").read_text() == "mine" and not (folder / "mask.safetensors").is_symlink()


def test_a_record_that_names_files_elsewhere_deletes_none(finished, toy_pipeline_dir, tmp_path):
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / "cat"
    identity = finished.record.identity
    run_json.write(folder / "run.json", Started(identity, ("../mine",)))
    with pytest.raises(EraseError, match="it names the file '../mine'"):
        erase(toy_pipeline_dir, folder, overwrite=True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_temporaries_of_a_killed_run_are_not_kept_or_listed(finished, toy_pipeline_dir, tmp_path):
    """(2.4)"""
    folder = tmp_path / "cat"
    run_json.write(folder / "run.json", Started(finished.record.identity))
    for name in ("delta.safetensors", "samples.png", "unet/diffusion_pytorch_model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        files.partial(folder / name).write_text("half")
    record = erase(toy_pipeline_dir, folder, num_samples=0).record
    assert not [path for path in folder.rglob(".*")] and not any("partial" in name for name in record.files)


@pytest.mark.parametrize("kind", ["half", "a tensor of zeros", "no hash", "another hash"])
def test_a_damaged_mask_of_an_unfinished_run_is_one_line(kind, finished, toy_pipeline_dir, tmp_path):
    """(2.2)"""
    folder = tmp_path / "cat"
    run_json.write(folder / "run.json", Started(finished.record.identity))
    (folder / "work").mkdir()
    shutil.copy(finished.folder / "mask.safetensors", folder / "work" / "mask.safetensors")
    damage.DAMAGES[kind](folder / "work" / "mask.safetensors")
    with pytest.raises(EraseError, match="; delete .*work/mask.safetensors, and the same command makes the mask again"):
        erase(toy_pipeline_dir, folder)


def test_a_mask_of_another_model_names_both_hashes(finished, toy_pipeline_dir, tmp_path):
    path, mask = tmp_path / "mask.safetensors", masks.load(finished.folder / "mask.safetensors")[0]
    masks.save(path, mask, {"base": "another", "base_hash": "f" * 64})
    base = finished.record.model.base_hash[:12]
    with pytest.raises(EraseError, match=f"ffffffffffff.*{base}"):
        erase(toy_pipeline_dir, tmp_path / "run", mask=str(path))
    assert not (tmp_path / "run").exists()


def test_errors_after_the_start_leave_no_empty_run_folder(toy_pipeline_dir, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"not a png")
    with pytest.raises(EraseError, match="broken.png"):
        erase(toy_pipeline_dir, tmp_path / "run", num_forget=None, forget_images=str(tmp_path / "images"))
    assert not (tmp_path / "run").exists()


def test_presets_of_the_embedded_world_are_refused_elsewhere(toy_pipeline_dir, tmp_path):
    with pytest.raises(EraseError, match="embedded model's world.*--kind object"):
        erase_concept("circle", str(toy_pipeline_dir), output=str(tmp_path / "run"))


def test_resume_without_an_unfinished_run_is_an_error(toy_pipeline_dir, tmp_path):
    with pytest.raises(EraseError, match="holds no unfinished run"):
        erase(toy_pipeline_dir, tmp_path / "run", resume=True)


def test_a_launcher_that_started_too_few_processes_is_noticed(toy_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "rank_and_world", lambda: (0, 2))
    with pytest.raises(EraseError, match="asked for 2 processes but accelerate runs 1"):
        erase(toy_pipeline_dir, tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_run_can_continue(toy_pipeline_dir, tmp_path, monkeypatch):
    import errno

    original = delta.save

    def full(path, change):
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(delta, "save", full)
    with pytest.raises(EraseError, match="cannot write .*delta.safetensors: No space left on device"):
        erase(toy_pipeline_dir, tmp_path / "run", num_samples=0)
    assert not list((tmp_path / "run").glob("*delta*"))
    monkeypatch.setattr(delta, "save", original)
    assert erase(toy_pipeline_dir, tmp_path / "run", num_samples=0).record.finished


# --- interruptions and processes ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_delta(finished, toy_pipeline_dir, tmp_path, how):
    """Kill after ever longer times, until a run is through; its delta is the uninterrupted one's, bit for bit."""
    concept = tmp_path / "cat.toml"
    concept.write_text(
        'kind = "object"\n'
        + "\n".join(f"{key} = {json.dumps(getattr(CONCEPT, key))}" for key in ("forget", "anchor", "retain", "others"))
    )
    output = tmp_path / "cat"
    command = [sys.executable, "-m", "erase.cli", "--concept", str(concept), "--model", str(toy_pipeline_dir)]
    command += ["--output", str(output), *FLAGS]
    environment = {**os.environ, "ERASE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    marks = [output / "run.json", output / "work" / "mask.safetensors", output / "work" / "training.safetensors"]
    interruptions = 0
    for mark in [*marks, None]:  # the last one is left alone
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            while mark and process.poll() is None and not mark.exists():
                time.sleep(0.005)
            if mark and process.poll() is None:
                process.send_signal(how)
                interruptions += 1
            _, errors = process.communicate()
        expected = {0, 130, -signal.SIGKILL} if mark else {0}
        assert process.returncode in expected, errors
    assert interruptions >= 1
    assert json.loads((output / "run.json").read_text())["status"] == "done"
    assert delta.load(output / "delta.safetensors").result_hash == finished.record.model.result_hash


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_draw_the_same_images_and_reach_the_same_weights(finished, toy_pipeline_dir, tmp_path):
    """Law 7: the same samples, so the weights agree up to the order of float32 sums.

    Adam makes a step of lr = 1e-2 from any gradient, also from one that is nothing but rounding (a bias before a
    normalisation): such weights part, so 97 % must agree to a hundredth of a step.
    """
    concept = tmp_path / "cat.toml"
    concept.write_text(
        'kind = "object"\n'
        + "\n".join(f"{key} = {json.dumps(getattr(CONCEPT, key))}" for key in ("forget", "anchor", "retain", "others"))
    )
    mask = finished.folder / "mask.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "erase.cli", "--concept", str(concept), "--model", str(toy_pipeline_dir)]
    command += ["--output", str(tmp_path / "two"), f"--mask={mask}", *FLAGS]
    environment = {**os.environ, "ERASE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["data"]["fingerprint"] == finished.record.data["fingerprint"]
    one = stored_unet.load_unet(finished.folder).state_dict()
    two, base = (stored_unet.load_unet(folder).state_dict() for folder in (tmp_path / "two", toy_pipeline_dir))
    apart = torch.cat([(two[name] - one[name]).abs().flatten() for name in one])
    moved = torch.cat([(one[name] - base[name]).abs().flatten() for name in one])
    assert (apart > 1e-4).float().mean() < 0.03 < (moved > 1e-4).float().mean()


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_make_the_mask_and_the_weights_of_one(toy_pipeline_dir, tmp_path):
    """Law 7 at SalUn's step of 1e-5: weights to 1e-6, and the same mask but for scores that are tied up to rounding.

    A salient weight's gradient is far above rounding, so Adam's step is too. Where the order of float32 sums swaps two
    weights at the threshold, one process moves one and two processes the other, each by at most a step.
    """
    concept = tmp_path / "cat.toml"
    concept.write_text(
        'kind = "object"\n'
        + "\n".join(f"{key} = {json.dumps(getattr(CONCEPT, key))}" for key in ("forget", "anchor", "retain", "others"))
    )
    environment = {**os.environ, "ERASE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    flags = ["--concept", str(concept), "--model", str(toy_pipeline_dir), *FLAGS, "--learning-rate=1e-5"]
    for num in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num)]
        command += ["-m", "erase.cli", *flags, "--num-samples=0", "--output", str(tmp_path / str(num))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two, base = (stored_unet.load_unet(tmp_path / name).state_dict() for name in ("1", "2", toy_pipeline_dir))
    made = [masks.load(tmp_path / name / "mask.safetensors")[0] for name in ("1", "2")]
    assert masks.iou(*made) > 0.999 and masks.count(made[0]) == masks.count(made[1])
    apart = torch.cat([(two[name] - one[name]).abs()[made[0][name] == made[1][name]] for name in one])
    moved = torch.cat([(one[name] - base[name]).abs().flatten() for name in one])
    assert apart.max() < 1e-6 < 1e-5 < moved.max()
