"""What every registered task and judge must do, ours and those of other packages."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from erase import concepts
from erase.concepts import Concept
from erase.errors import EraseError
from erase.evaluation import shapes
from erase.evaluation.judges.protocol import Judge
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.options import Options
from erase.evaluation.plan import Column, present
from erase.evaluation.tasks import registry
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task
from erase.mini.pixel import drawings

HEADER = "prompt,categories,nudity_percentage,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height"
ROWS = [f"a person {i},sexual,60.0,{i},7,512,512" for i in range(8)]
CONCEPTS = {"mini": ("circle", "mini"), "imagenet": ("church", None), "clip": ("van_gogh", None)}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.csv"
    path.write_text("\n".join([HEADER, *ROWS, ""]))
    return str(path)


def concept_of(task: Task) -> Concept | None:
    if task.concept_judges == ("classes",):
        return concepts.of_class("circle", drawings.CLASSES)
    name, family = CONCEPTS[task.concept_judges[0]] if task.concept_judges else (None, None)
    return concepts.load(name, model_family=family) if name else None


def built(name: str, prompts: str, **options: Any) -> SampleSet:
    return registry.build(name, concept_of(registry.make(name)), Options(prompts=prompts, num_images=2, **options))


def said(shape: Any, options: dict[str, Any], draw: random.Random) -> Any:
    """Any value of a shape; texts are labels that CLIP could choose, or as many zero bytes as any judge decodes."""
    if isinstance(shape, (set, frozenset)):
        return draw.choice(sorted(shape))
    if isinstance(shape, list):
        return [said(one, options, draw) for one in (shape if len(shape) > 1 else shape * 5)]
    if isinstance(shape, dict):
        return {key.removesuffix("?"): said(of, options, draw) for key, of in shape.items()}
    texts = [options["target"], *options["alternatives"]] if "target" in options and "alternatives" in options else []
    return {float: draw.random(), int: draw.randrange(1000), str: draw.choice(texts or ["AAAA" * 256])}[shape]


def lines(judges: Sequence[str], samples: Sequence[Sample], options: dict[str, Any], *, invalid: bool = False) -> Any:
    draw = random.Random(0)
    one = {"id": "", "invalid": "black"}
    return {
        judge: [one if invalid else {"invalid": None, **said(JUDGES.load(judge).outputs, options, draw)}
                for _ in samples]
        for judge in judges
    }  # fmt: skip


@pytest.fixture(params=registry.TASKS.names())
def task(request) -> Task:
    return registry.make(request.param)


@pytest.fixture(params=JUDGES.names())
def judge(request) -> tuple[str, type[Judge]]:
    return request.param, JUDGES.load(request.param)


def generating(task: Task) -> None:
    if task.name in {"images", "attack"}:
        pytest.skip("has no samples of its own")


def test_a_task_says_what_it_is(task):
    assert task.about and task.version >= 1
    assert {*task.judges} <= {*JUDGES.names()}


def test_a_task_refuses_a_concept_that_it_cannot_judge(task, prompts):
    other = concepts.load("nudity")  # whose judge is NudeNet
    if not task.concept_judges:
        task.concept_needed(other)
        return
    for wrong in (None, other):
        with pytest.raises(EraseError, match=f"the task {task.name} (needs a concept|cannot judge 'nudity')"):
            registry.build(task.name, wrong, Options(prompts=prompts))


def test_the_same_options_build_the_same_samples_and_their_options_are_readable(task, prompts):
    generating(task)
    one, two = built(task.name, prompts), built(task.name, prompts)
    assert one.identity() == two.identity() and one.samples == two.samples
    assert (one.id, one.version) == (task.name, task.version)
    shapes.check(dict(one.options), task.options_shape(), "options")
    assert {sample.role for sample in one.samples} <= {"forget", "synonym", "retain", ""}


def test_a_limit_takes_samples_of_the_whole_list_unchanged(task, prompts):
    generating(task)
    whole, part = built(task.name, prompts), built(task.name, prompts, limit=1)
    assert len(part.samples) == 1 and set(part.samples) < set(whole.samples)
    assert part.identity() != whole.identity()


def test_a_plan_has_an_outcome_for_each_sample_and_names_its_own_columns(task, prompts):
    generating(task)
    made = built(task.name, prompts)
    options = dict(made.options)
    plan = task.plan(made.samples, lines(made.judges or ("nudenet",), made.samples, options), options)
    names = [column.name for column in plan.columns]
    assert len(set(names)) == len(names) and present(plan.columns)
    assert all(len(column.values) == len(made.samples) for column in plan.columns)
    assert len(plan.flagged) == len(made.samples)
    assert {plan.erasure, plan.retention} - {None} <= set(names)
    assert {group.column for group in plan.groups} <= set(names)
    assert all(len(group.labels) == len(made.samples) for group in plan.groups)


def is_best(column: Column, value: bool | float | None) -> bool:
    """Something where more is better, nothing where less is."""
    return value is not None and bool(value) == column.higher_is_better


def test_an_invalid_image_is_never_a_success(task, prompts):
    generating(task)
    made = built(task.name, prompts)
    options = dict(made.options)
    unseen = lines(made.judges or ("nudenet", "clip-score"), made.samples, options, invalid=True)
    plan = task.plan(made.samples, unseen, options)
    assert not any(is_best(column, value) for column in plan.columns for value in column.values)
    assert not any(plan.flagged)


def test_a_judge_is_registered_under_its_name_and_says_what_its_scores_hold(judge):
    name, cls = judge
    assert cls.about and cls.outputs
    output = said(cls.outputs, {}, random.Random(0))
    shapes.check(output, cls.outputs, name)
    assert cls.name in {name, ""}  # NudeNet sets it when it is made
    with pytest.raises(EraseError):
        shapes.check({**output, "of": "another judge"}, cls.outputs, name)


def test_a_judge_agrees_with_itself_up_to_rounding_and_with_nothing_else(judge):
    _, cls = judge
    output = said(cls.outputs, {}, random.Random(0))
    assert cls.agrees(output, said(cls.outputs, {}, random.Random(0)))
    assert not cls.agrees(output, {})


def test_a_judges_figures_of_own_images_have_an_outcome_each_and_no_success_for_invalid_ones(judge):
    name, cls = judge
    options = {"concept": "it", "index": 1, "target": "a", "alternatives": ["b"], "head": "object", "label": "circle"}
    samples = [Sample(str(i), "a thing", i, "") for i in range(6)]
    for invalid in (False, True):
        figures = cls.figures(lines([name], samples, options, invalid=invalid), options)
        assert all(len(column.values) == 6 for column in figures.columns)
        assert figures.flagged is None or len(figures.flagged) == 6
        if invalid:
            assert not any(is_best(column, value) for column in figures.columns for value in column.values)
            assert not any(figures.flagged or ())


def test_a_judge_says_of_which_concepts_it_can_tell_whether_they_are_shown(judge):
    _, cls = judge
    options = {"concept": "it", "index": 1, "target": "a", "alternatives": ["b"], "head": "object", "label": "circle"}
    output = said(cls.outputs, {}, random.Random(0))
    if cls.knows(options):
        assert cls.shows(output, options) in {True, False}
    else:
        with pytest.raises(EraseError, match="cannot tell whether an image shows a concept"):
            cls.shows(output, options)
