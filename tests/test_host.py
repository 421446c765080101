"""--erase-from: an attribute is taken from one concept, and kept in all others."""

from typing import Any

import pytest
from toy_training import CONCEPT

from erase import concepts, erase_concept
from erase.errors import EraseError
from erase.options.settings import Settings
from erase.runs.subjects import find_concept


def test_prompts_that_say_the_host_are_forgotten_and_all_others_are_retained():
    striped = concepts.load("striped", model_family="mini")
    found = concepts.erased_from(striped, "circle")
    assert found.name == "striped from circle" and found.judge == striped.judge
    assert set(found.forget) == {prompt for prompt in striped.forget if "circle" in prompt}
    assert dict(found.pairs()) == {f: a for f, a in striped.pairs() if "circle" in f}
    kept = {prompt for prompt in striped.forget if "circle" not in prompt}
    assert 0 < len(found.forget) < len(striped.forget) and kept <= set(found.retain)
    assert set(found.anchor) <= set(found.retain) and set(striped.retain) <= set(found.retain)


def test_without_such_a_prompt_they_are_made_from_both():
    glasses = concepts.describe("glasses", "object")
    found = concepts.erased_from(glasses, "engineer")
    assert found.pairs()[0] == ("a photo of an engineer with glasses", "a photo of an engineer")
    assert all(forget.replace(" with glasses", "") == anchor for forget, anchor in found.pairs())
    assert set(glasses.forget) <= set(found.retain)
    style = concepts.erased_from(concepts.describe("Van Gogh", "style"), "cat")
    assert style.pairs()[0] == ("a picture of a cat in the style of Van Gogh", "a picture of a cat")


def test_a_host_is_refused_as_a_target_is():
    with pytest.raises(EraseError, match="--erase-from is ''"):
        concepts.erased_from(concepts.describe("glasses", "object"), " ")
    with pytest.raises(EraseError):
        concepts.erased_from(concepts.load("nudity"), "child")


@pytest.mark.parametrize("host", ["glasses", "Glasses ", "GLASSES!"])
def test_a_concept_is_not_erased_from_itself(host):
    with pytest.raises(EraseError, match="^--erase-from names the concept 'glasses' itself"):
        concepts.erased_from(concepts.describe("glasses", "object"), host)
    assert concepts.erased_from(concepts.describe("glasses", "object"), "wine glasses").forget  # a concept of its own


def test_the_option_reaches_the_concept_and_the_weights(toy_pipeline_dir, tmp_path):
    how: dict[str, Any] = {"method": "uce", "num_samples": 0, "save": ("delta",), "quiet": True}
    runs = [
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / str(host)), erase_from=host, **how).record
        for host in (None, "kitten", "woman")
    ]
    assert [run.concept.name for run in runs] == ["cat", "cat from kitten", "cat from woman"]
    assert runs[1].concept.forget == ("a kitten",) and "a photo of a cat" in runs[1].concept.retain
    assert len({run.model.result_hash for run in runs}) == 3
    found = find_concept(Settings("striped", "mini", erase_from="circle"), "striped", None, None)
    assert found.name == "striped from circle"


def test_a_method_without_anchors_would_erase_the_host_too(toy_pipeline_dir, tmp_path):
    with pytest.raises(
        EraseError, match="^--erase-from needs a method with anchors, which keep 'kitten' itself; esd-x"
    ):
        out = str(tmp_path / "run")
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=out, erase_from="kitten", method="esd-x", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "host"), [("circle", "square"), ("striped", "scientist")])
def test_the_embedded_model_takes_only_hosts_that_prompts_of_the_concept_say(name, host):
    """It draws one thing on an image, so prompts made of two concepts mean nothing to it."""
    with pytest.raises(EraseError, match=f"^--erase-from is '{host}', but no forget prompt of '{name}' says it"):
        find_concept(Settings(name, "mini", erase_from=host), name, None, None)
