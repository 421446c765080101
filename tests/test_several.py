"""Several concepts at once and one after another: one united concept, one united mask, and each kept for its judge."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from loaded import load_sd

from erase import cli, concepts, delta, erase_concept, files, masks, tensor_files
from erase.concepts import Concept, unite
from erase.data import latents, prompt_states
from erase.errors import EraseError
from erase.evaluation import evaluate, sources
from erase.evaluation.options import Options
from erase.evaluation.tasks import class_forget, registry
from erase.families import stored_unet
from erase.options.effect import OF_IMAGES, OF_TRAINING
from erase.options.settings import Settings
from erase.runs import card, job

CAT = Concept(
    "cat",
    "object",
    forget=("a cat", "a photo of a cat"),
    anchor=("a dog", "a photo of a dog"),
    retain=("a tree", "a boat", "a lorry", "a puss"),
    others=("a bird", "a lorry"),
    judge={"type": "imagenet", "index": 281},
    synonyms=("kitty",),
)
LORRY = Concept(
    "lorry",
    "object",
    forget=("a lorry",),
    anchor=("a bus",),
    retain=("a house", "a boat", "a kitty"),
    others=("a bird", "a cat"),
    judge={"type": "imagenet", "index": 555},
)
OPTIONS: dict[str, Any] = {
    "num_forget": 6,
    "num_retain": 4,
    "num_inference_steps": 2,
    "num_train_steps": 3,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "num_samples": 0,
    "generation_batch_size": 2,
    "device": "cpu",
    "quiet": True,
}
RUN = {name: value for name, value in OPTIONS.items() if name != "quiet"}
SOLVED = {name: value for name, value in OPTIONS.items() if name not in (*OF_TRAINING, *OF_IMAGES)}  # closed forms


# --- one concept of several -----------------------------------------------------------------------------------------


def test_united_pairs_take_turns_with_the_same_share_each():
    united = unite([CAT, LORRY])
    assert united.pairs() == (
        ("a cat", "a dog"),
        ("a lorry", "a bus"),
        ("a photo of a cat", "a photo of a dog"),
        ("a lorry", "a bus"),
    )
    assert united.name == "cat and lorry" and united.kind == "object" and not united.judge


def test_what_another_one_forgets_or_mentions_is_not_retained():
    """ "a lorry" is forgotten, "a kitty" is a cat by another name; the control: each keeps them while it is alone."""
    united = unite([CAT, LORRY])
    assert united.retain == ("a tree", "a boat", "a puss", "a house")
    assert united.others == ("a bird",)
    assert "a lorry" in CAT.retain and "a kitty" in LORRY.retain


def test_one_concept_stays_itself_and_twice_the_same_is_once():
    assert unite([CAT]) is CAT and unite([CAT, CAT]) is CAT and concepts.apart([CAT, CAT]) == [CAT, CAT]
    assert unite([CAT, replace(LORRY, kind="style")]).kind == "object"
    assert unite([CAT, replace(LORRY, kind="nudity")]).kind == "nudity"


def test_an_anchor_that_is_forgotten_too_becomes_what_that_one_says():
    """The embedded world's moon becomes a circle, and its circle a square."""
    moon, circle = (concepts.load(name, model_family="mini") for name in ("moon", "circle"))
    told = dict(unite([moon, circle]).pairs())
    assert dict(moon.pairs())["a photo of a solid red moon"] == "a photo of a solid red circle"
    assert (
        told["a photo of a solid red moon"] == told["a photo of a solid red circle"] == "a photo of a solid red square"
    )
    assert not any("circle" in anchor or "moon" in anchor for anchor in told.values())


def announced(parts: list[Concept], model, folder, **options: Any) -> list[str]:
    """What a run that erases the parts says before it starts."""
    lines: list[str] = []
    settings = Settings(tuple(part.name for part in parts), model=str(model), output=str(folder), **(RUN | options))
    job.run(settings, parts, quiet=True, tell=lines.append)
    return lines


@pytest.mark.slow
@pytest.mark.ci
def test_the_announcement_names_the_anchor_that_is_trained(toy_pipeline_dir, tmp_path):
    """A lorry becomes a cat and the cat a dog, so the lorry becomes a dog; the control is the lorry alone."""
    lorry = replace(LORRY, anchor=("a cat",))
    alone = announced([lorry], toy_pipeline_dir, tmp_path / "alone")
    assert alone == ["lorry: 'a lorry' -> 'a cat'"]
    together = announced([lorry, CAT], toy_pipeline_dir, tmp_path / "together")
    assert together == ["lorry: 'a lorry' -> 'a dog'", "cat: 'a cat' -> 'a dog' (and 1 more pair)"]
    cat = tmp_path / "cat"
    announced([CAT], toy_pipeline_dir, cat)
    assert announced([lorry], cat, tmp_path / "after", base=str(cat)) == ["lorry: 'a lorry' -> 'a dog'"]


def test_the_announcement_names_the_class_that_is_trained(toy_pipeline_dir, tmp_path):
    """The first other class of the lorry is erased too; the control is the lorry alone."""
    lorry = replace(LORRY, others=("a cat", "a bird"))
    assert announced([lorry], toy_pipeline_dir, tmp_path / "alone", target="fixed") == ["lorry: 'a lorry' -> 'a cat'"]
    together = announced([lorry, CAT], toy_pipeline_dir, tmp_path / "together", target="fixed")
    assert together[0] == "lorry: 'a lorry' -> 'a bird'"


def test_a_pair_whose_anchor_mentions_another_one_goes():
    circle, striped = (concepts.load(name, model_family="mini") for name in ("circle", "striped"))
    united = unite([circle, striped])
    assert not any("circle" in anchor or "strip" in anchor for anchor in united.anchor)
    assert "a photo of a striped red circle" in united.forget and "a photo of a checked red circle" in united.forget
    assert not any("circle" in prompt or "striped" in prompt for prompt in united.retain) and len(united.retain) > 40


def test_two_that_would_become_each_other_are_refused():
    other = replace(LORRY, name="dog", forget=("a dog", "a photo of a dog"), anchor=("a cat", "a photo of a cat"))
    with pytest.raises(EraseError, match="'cat' would become 'a dog', which is erased too"):
        unite([CAT, other])


# --- at once --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(toy_pipeline_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both") / "run"
    cache = str(tmp_path_factory.mktemp("cache"))
    return erase_concept([CAT, LORRY], str(toy_pipeline_dir), output=str(folder), cache_dir=cache, **OPTIONS)


def test_the_mask_is_the_union_of_one_for_each_at_the_density(both, toy_pipeline_dir, monkeypatch, tmp_path):
    mask, header = masks.load(both.folder / "mask.safetensors")
    half = header.total // 2
    assert half < header.ones < 2 * half and header.made["concepts"] == ["cat", "lorry"]
    assert both.record.mask.ones == header.ones
    # one after the other by hand: what the pass over each one's images selects
    seen: list[Any] = []
    select = masks.select_packed
    monkeypatch.setattr(masks, "select_packed", lambda *a, **o: seen.append(select(*a, **o)) or seen[-1])
    erase_concept([CAT, LORRY], str(toy_pipeline_dir), output=str(tmp_path / "again"), **OPTIONS)
    assert len(seen) == 2 and all(masks.count(own) == half for own in seen)
    assert masks.iou(seen[0], seen[1]) < 1
    assert all(torch.equal(mask[name], seen[0][name] | seen[1][name]) for name in mask)


def test_each_concept_has_its_own_images(toy_pipeline_dir, monkeypatch, tmp_path):
    parts: list[latents.Data] = []
    of_prompts = latents.of_prompts
    monkeypatch.setattr(latents, "of_prompts", lambda *a: parts.append(of_prompts(*a)) or parts[-1])
    erase_concept([CAT, LORRY], str(toy_pipeline_dir), output=str(tmp_path / "run"), **OPTIONS)
    named = [{part.prompts[row] for row in part.forget.prompt.tolist()} for part in parts]
    assert named == [{"a cat", "a photo of a cat"}, {"a lorry"}] and [len(part.forget) for part in parts] == [3, 3]
    assert all(len(part.anchor) == len(part.words) == len(part.end) == 3 for part in parts)


def test_no_bit_moves_outside_the_united_mask(both, toy_pipeline_dir):
    mask, _ = masks.load(both.folder / "mask.safetensors")
    base, erased = (stored_unet.load_unet(folder).state_dict() for folder in (toy_pipeline_dir, both.folder))
    moved = {name: base[name].view(torch.int32) != erased[name].view(torch.int32) for name in base}
    assert not any((moved[name] & ~mask[name]).any() for name in base)
    assert sum(int(m.sum()) for m in moved.values()) > 0.9 * masks.count(mask)


def test_the_record_keeps_each_concept_for_its_judge(both):
    record = json.loads((both.folder / "run.json").read_text())
    assert [part["name"] for part in record["concepts"]] == ["cat", "lorry"]
    assert [part["judge"]["index"] for part in record["concepts"]] == [281, 555]
    assert record["concept"]["name"] == "cat and lorry" and record["settings"]["concept"] == ["cat", "lorry"]

    found = sources.concept_of("lorry", None, str(both.folder))
    assert found is not None and found == LORRY and found.judge == LORRY.judge
    with pytest.raises(EraseError, match="erased cat, lorry; choose one with --concept"):
        sources.concept_of(None, None, str(both.folder))


def test_nothing_that_was_erased_is_asked_to_stay():
    """Judging the circle of a model without circle and moon must not call the missing moon a damage."""
    circle, moon, striped = (concepts.load(name, model_family="mini") for name in ("circle", "moon", "striped"))
    alone, beside = registry.build("mini", circle), registry.build("mini", circle, also_erased=[moon, striped])
    gone = {s.id for s in alone.samples} - {s.id for s in beside.samples}
    wanted = {s.id for s in alone.samples if s.role == "retain" and {"moon", "striped"} & set(s.facts.values())}
    assert gone == wanted and len(gone) > 16
    assert beside.options["also_erased"] == ["moon", "striped"] and "also_erased" not in alone.options

    church, tench = (concepts.load(name) for name in ("church", "tench"))
    classes = registry.build("class-forget", church, Options(num_images=2), [tench])
    assert {s.label for s in classes.samples} == set(class_forget.IMAGENETTE) - {"tench"}
    clip = replace(CAT, judge={"type": "clip", "target": "a cat", "alternatives": ["a dog", "a lorry"]})
    lorry = replace(LORRY, judge={"type": "clip", "target": "a lorry", "alternatives": ["a dog", "a cat"]})
    assert {s.label for s in registry.build("object", clip, also_erased=[lorry]).samples} == {"a cat", "a dog"}


def test_each_concept_of_a_run_has_its_own_report(both, tmp_path):
    model, folders = str(both.folder), []
    for concept in ("church", "lorry"):
        request = evaluate.Request([model], ["quality"], tmp_path, concept=concept)
        folders.append(evaluate._job(request, model, "quality").folder)
    assert [folder.relative_to(tmp_path).parts[0] for folder in folders] == [
        f"{both.folder.name}-church",
        f"{both.folder.name}-lorry",
    ]


def test_too_few_images_for_all_are_refused(toy_pipeline_dir, tmp_path):
    with pytest.raises(EraseError, match="--num-forget 1 leaves no image for the prompt 'a lorry'; generate more"):
        erase_concept([CAT, LORRY], str(toy_pipeline_dir), output=str(tmp_path / "run"), **{**OPTIONS, "num_forget": 1})


@pytest.mark.parametrize("method", ["uce", "rece", "speed"])
def test_closed_forms_send_every_concept_to_its_anchor(toy_pipeline_dir, tmp_path, method):
    """Their residual |W' c_e - W c_a| falls for each of the two, against the base's.

    RECE without its later rounds, which fit other embeddings than c_e: 8 dimensions have no room for both.
    """
    sets = {"uce": (), "rece": ("epochs=0",), "speed": ("threshold=1", "filter=false", "rho=0.01")}
    options = {**SOLVED, "method": method, "set": sets[method]}
    erase_concept([CAT, LORRY], str(toy_pipeline_dir), output=str(tmp_path / "run"), **options)
    base = load_sd(toy_pipeline_dir)
    erased = stored_unet.load_unet(tmp_path / "run").state_dict()
    names = [name for name in erased if name.endswith("attn2.to_v.weight")]
    for concept in (CAT, LORRY):
        c_e, c_a = (part.float() for part in prompt_states.read_text(base, concept).pairs("last"))
        before, after = (
            sum(float((state[name] @ c_e - base.unet.state_dict()[name] @ c_a).norm()) for name in names)
            for state in (base.unet.state_dict(), erased)
        )
        assert after < 0.9 * before


def test_names_and_concepts_may_be_mixed_and_one_concept_is_as_before(toy_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {**SOLVED, "method": "uce", "save": ("pipeline",)}
    mixed = erase_concept(["church", CAT], str(toy_pipeline_dir), **options)
    assert str(mixed.folder) == "runs/church_and_cat" and mixed.record.concept.name == "church and cat"
    single = erase_concept("golf ball", str(toy_pipeline_dir), **options)
    assert str(single.folder) == "runs/golf_ball" and single.record.settings["concept"] == ["golf ball"]
    assert Settings("church").concept == ("church",) and Settings(("church", "tench")).concept == ("church", "tench")
    with pytest.raises(EraseError, match="--forget and --anchor go with one --concept"):
        Settings(("church", "tench"), forget=("a church",))
    with pytest.raises(EraseError, match="no concept given"):
        erase_concept([], str(toy_pipeline_dir))


# --- one after another ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(toy_pipeline_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "cat"
    cache = str(tmp_path_factory.mktemp("cache"))
    return erase_concept(CAT, str(toy_pipeline_dir), output=str(folder), cache_dir=cache, density=0.2, **OPTIONS)


def test_a_second_run_goes_on_from_the_first(first, toy_pipeline_dir, tmp_path):
    second = erase_concept(LORRY, base=str(first.folder), output=str(tmp_path / "run"), density=0.1, **OPTIONS)
    record = second.record
    assert record.model.base_hash == first.record.model.result_hash
    assert record.model.origin == str(toy_pipeline_dir)
    assert record.model.origin_hash == first.record.model.base_hash
    assert record.base and record.base["run"] == str(first.folder) and record.base["concepts"] == ["cat"]
    assert [part.name for part in record.concepts] == ["lorry", "cat"]
    assert {"a cat", "a lorry"} <= set(record.concept.forget)  # the earlier one is trained along
    text = (second.folder / "README.md").read_text()
    names = [card.escaped(path.name) for path in (first.folder, toy_pipeline_dir)]
    assert f"The base is another run, {names[0]}, which had erased cat from {names[1]}." in text
    # masks united: the first one's, and a tenth for the new concept
    old, new = (masks.load(run.folder / "mask.safetensors")[0] for run in (first, second))
    assert all((new[name] | ~old[name]).all() for name in old)
    assert record.mask is not None
    total = record.mask.weights
    assert masks.count(old) < masks.count(new) <= int(0.2 * total) + int(0.1 * total)
    moved = tensor_files.read_metadata(second.folder / "mask.safetensors")
    assert moved["united_with"] == str(first.folder) and moved["base_hash"] == record.model.base_hash
    # its delta takes it back to the first run, bit for bit
    state = {f"unet.{name}": tensor for name, tensor in stored_unet.load_unet(second.folder).state_dict().items()}
    restored = delta.remove(state, delta.load(second.folder / "delta.safetensors"))
    there = stored_unet.load_unet(first.folder).state_dict()
    assert all(torch.equal(restored[f"unet.{name}"], tensor) for name, tensor in there.items())


def test_a_third_run_keeps_both_and_the_same_call_finds_the_finished_one(first, toy_pipeline_dir, tmp_path):
    options = {**SOLVED, "method": "uce"}
    second = erase_concept(LORRY, base=str(first.folder), output=str(tmp_path / "second"), **options)
    bird = Concept("bird", "object", ("a bird",), ("a leaf",), retain=("a tree",))
    third = erase_concept(bird, base=str(second.folder), output=str(tmp_path / "third"), **options)
    assert [part.name for part in third.record.concepts] == ["bird", "lorry", "cat"]
    assert third.record.model.origin == str(toy_pipeline_dir)
    assert third.record.model.origin_hash == first.record.model.base_hash
    again = erase_concept(bird, base=str(second.folder), output=str(tmp_path / "third"), **options)
    assert again.record == third.record


def test_a_base_is_verified_before_it_is_believed(first, tmp_path):
    """(2.3)"""
    base = tmp_path / "base"
    shutil.copytree(first.folder, base)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EraseError, match=f"{weights.relative_to(base)} was altered"):
        erase_concept(LORRY, base=str(base), output=str(tmp_path / "run"), **OPTIONS)
    shutil.copy(first.folder / "unet" / weights.name, weights)
    record = files.read_json(base / "run.json")
    files.write_json(base / "run.json", {**record, "concepts": [{"x": 1}]})
    with pytest.raises(EraseError, match=r"run\.json is damaged: its concepts cannot be read"):
        erase_concept(LORRY, base=str(base), output=str(tmp_path / "run"), **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_the_command_names_the_model_that_a_second_run_started_from(first, tmp_path, capsys):
    toml = tmp_path / "lorry.toml"
    toml.write_text('kind = "object"\nforget = ["a lorry"]\nanchor = ["a bicycle"]\nretain = ["a tree"]\n')
    options = "--method uce --num-samples 0 --save delta --device cpu --quiet".split()
    cli.main(["--concept", str(toml), "--base", str(first.folder), "--output", str(tmp_path / "run"), *options])
    assert f"erased from {first.folder} in" in capsys.readouterr().out


def test_a_base_that_is_none_is_refused(first, toy_pipeline_dir, tmp_path):
    def go(base: str, model: str = "CompVis/stable-diffusion-v1-4", output: str = str(tmp_path / "run")) -> None:
        erase_concept(LORRY, model, base=base, output=output, **OPTIONS)

    for wrong in (str(toy_pipeline_dir), str(tmp_path / "nowhere")):
        with pytest.raises(EraseError, match="no finished run with a pipeline; give a run folder"):
            go(wrong)
    with pytest.raises(EraseError, match=f"was made from {toy_pipeline_dir}, not from org/other; leave out --model"):
        go(str(first.folder), "org/other")
    with pytest.raises(EraseError, match="is this run's own output"):
        go(str(first.folder), output=str(first.folder))
    assert not (tmp_path / "run").exists()
