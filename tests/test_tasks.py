"""Prompt sets: pinned, fingerprinted, read as they are, and the same seeds for ever."""

import csv
from pathlib import Path

import pytest

from erase import concepts
from erase.concepts import refusal
from erase.errors import EraseError
from erase.evaluation.options import Options
from erase.evaluation.tasks import i2p, protocol, registry

I2P = Path(__file__).resolve().parents[2] / "shared" / "data" / "i2p" / "unsafe-prompts4703.csv"
real_i2p = pytest.mark.skipif(not I2P.exists(), reason="the real I2P file is not here")

COLUMNS = ("prompt", "categories", "nudity_percentage", "sd_image_width", "sd_image_height")


def write_i2p(path: Path, prompts: list[str], *, original: bool = False, without: str = "") -> Path:
    seed, guidance = ("sd_seed", "sd_guidance_scale") if original else ("evaluation_seed", "evaluation_guidance")
    names = [name for name in (*COLUMNS, seed, guidance) if name != without]
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, names, extrasaction="ignore")
        out.writeheader()
        for number, prompt in enumerate(prompts):
            row = dict(prompt=prompt, categories="sexual, violence" if number % 2 else "hate", nudity_percentage=51.0)
            row |= {"sd_image_width": 512, "sd_image_height": 768, seed: 2**31 + number, guidance: 7}
            out.writerow(row)
    return path


@real_i2p
def test_the_real_i2p_has_its_rows_and_subsets():
    rows, name, _ = i2p.read_i2p(I2P)
    assert (len(rows), name) == (4703, "esd")
    assert rows[2260].prompt == "Null"  # lost by readers with NA parsing, restored here
    assert sum(i2p.in_subset(row.facts, "sexual") for row in rows) == 931
    assert sum(i2p.in_subset(row.facts, "nudity") for row in rows) == 95
    assert max(row.seed for row in rows) > 2**31 and {row.guidance for row in rows} > {7.0, 255.0}
    assert sum((row.height, row.width) != (512, 512) for row in rows) == 55


def test_a_benchmarks_rows_with_minors_are_counted_and_a_users_own_are_named(tmp_path):
    """I2P labels a row by its category and by the share of its images that show nudity (2.11)."""
    prompts = ["a girl in a garden", "a 2 5 y o woman", "a child on a beach", "a dog"]
    text = write_i2p(tmp_path / "i2p.csv", prompts).read_text().replace('"sexual, violence"', "violence")
    for name, share in (("plain", "49.9"), ("nude", "50.0")):
        (tmp_path / f"{name}.csv").write_text(text.replace(",51.0,", f",{share},"))
    plain = registry.build("i2p", None, Options(prompts=str(tmp_path / "plain.csv")))
    shown = registry.build("i2p", None, Options(prompts=str(tmp_path / "nude.csv")))
    assert (len(plain.samples), plain.refused) == (4, 0)
    assert [sample.prompt for sample in shown.samples] == ["a 2 5 y o woman", "a dog"] and shown.refused == 2
    own = tmp_path / "own.csv"
    own.write_text("prompt\na girl with a dog\na nudе gіrl\n", encoding="utf-8")
    with pytest.raises(EraseError, match=r"minors in a sexual context \('girl' in .*own\.csv, line 3\)"):
        registry.build("quality", None, Options(prompts=str(own)))


def test_no_task_holds_a_prompt_with_minors_in_a_sexual_context():
    """Whoever makes the task: the samples themselves are checked."""
    with pytest.raises(EraseError, match=r"minors in a sexual context \('boy' in the task mine\)"):
        protocol.SampleSet("mine", 1, {}, (protocol.Sample("a", "a naked b0y", 0, "forget"),), ())


@real_i2p
def test_prompts_with_minors_beside_sexual_content_are_counted_and_not_drawn():
    whole = registry.build("i2p", None, Options(prompts=str(I2P)))
    assert len(whole.samples) + whole.refused == 4703 and whole.refused > 100
    assert not any(refusal.shows_minors(s.prompt, "sexual" in s.facts["categories"]) for s in whole.samples)
    assert whole.identity()["refused"] == whole.refused


@pytest.mark.parametrize("original", [False, True])
def test_both_published_layouts_are_read_without_na_parsing(tmp_path, original):
    prompts = ["Null", "NA", "nan", "None", "two\nlines", 'a "quote", a comma', "a/b"]
    rows, name, _ = i2p.read_i2p(write_i2p(tmp_path / "i2p.csv", prompts, original=original))
    assert [row.prompt for row in rows] == prompts and name == "unknown"
    assert rows[1].seed == 2**31 + 1 and (rows[0].height, rows[0].width) == (768, 512)
    assert rows[1].facts["categories"] == ["sexual", "violence"]


@pytest.mark.parametrize("without", [*COLUMNS, "evaluation_seed", "evaluation_guidance"])
def test_a_missing_column_is_named(tmp_path, without):
    with pytest.raises(EraseError, match=f"has no column .*{without}"):
        i2p.read_i2p(write_i2p(tmp_path / "i2p.csv", ["x"], without=without))


def test_what_is_no_i2p_is_one_clear_line(tmp_path):
    path = write_i2p(tmp_path / "i2p.csv", ["x"])
    path.write_text(path.read_text().replace("51.0", "many"))
    with pytest.raises(EraseError, match="line 2: .*many"):
        i2p.read_i2p(path)
    with pytest.raises(EraseError, match="unknown I2P subset 'sexy'"):
        registry.build("i2p", None, Options(prompts=str(write_i2p(tmp_path / "b.csv", ["x"])), subset="sexy"))
    with pytest.raises(EraseError, match="No such file"):
        registry.build("i2p", None, Options(prompts=str(tmp_path / "absent.csv")))
    with pytest.raises(EraseError, match="cannot be downloaded from the hub .* give a local copy: --prompts FILE"):
        registry.build("i2p", None)


def test_every_image_of_a_prompt_has_its_own_seed_and_the_first_is_the_prompts(tmp_path):
    path = str(write_i2p(tmp_path / "i2p.csv", ["x", "y"]))
    one, three = (registry.build("i2p", None, Options(prompts=path, num_images=n)) for n in (1, 3))
    assert [s.seed for s in one.samples] == [s.seed for s in three.samples if s.id.endswith("-0")] == [2**31, 2**31 + 1]
    assert len({s.seed for s in three.samples}) == 6


def test_the_embedded_world_is_asked_for_the_concept_its_synonyms_and_all_else():
    task = registry.build("mini", concepts.load("circle", model_family="mini"))
    by_role = {role: [s for s in task.samples if s.role == role] for role in ("forget", "synonym", "retain")}
    assert {role: len(found) for role, found in by_role.items()} == {"forget": 100, "synonym": 40, "retain": 12 * 16}
    assert all("circle" in s.prompt for s in by_role["forget"]) and all("disc" in s.prompt for s in by_role["synonym"])
    assert not any(word in s.prompt.split() for s in by_role["retain"] for word in ("circle", "disc"))
    assert {s.facts["style"] for s in by_role["forget"]} == {"solid", "outline", "striped", "checked"}


def test_a_style_is_asked_for_on_every_object_and_articles_follow_the_word():
    task = registry.build("mini", concepts.load("outline", model_family="mini"))
    forget = [s for s in task.samples if s.role == "forget"]
    assert len({s.facts["object"] for s in forget}) == 11
    assert all(" a outline" not in s.prompt and " an out" in s.prompt for s in task.samples if s.role != "retain")
    assert {s.label for s in forget} == {"outline"}
    nude = registry.build("mini", concepts.load("nudity", model_family="mini"))
    named = {s.prompt.split(" a ")[1] for s in nude.samples if s.role == "forget"}
    assert {" ".join(name.split()[:2]) for name in named} == {"nude person", "nude mannequin"}


def test_imagenettes_classes_have_as_many_images_each_and_are_known_by_index():
    task = registry.build("class-forget", concepts.load("church"), Options(num_images=20))
    assert len(task.samples) == 200
    assert {s.facts["index"] for s in task.samples if s.role == "forget"} == {497}
    assert any(s.prompt == "a photo of an English springer" for s in task.samples)


def test_a_style_is_told_from_its_alternatives():
    task = registry.build("style", concepts.load("van_gogh"), Options(num_images=4))
    assert task.options["target"] == "a painting in the style of Van Gogh"
    assert {s.label for s in task.samples if s.role == "retain"} == set(task.options["alternatives"])


def test_captions_come_from_a_csv_with_their_own_seeds_or_from_the_concept(tmp_path):
    (tmp_path / "coco.csv").write_text("image_id,caption,evaluation_seed\n1,a cat,7\n2,a dog,\n")
    task = registry.build("quality", None, Options(prompts=str(tmp_path / "coco.csv")))
    assert [(s.prompt, s.seed == 7) for s in task.samples] == [("a cat", True), ("a dog", False)]
    own = registry.build("quality", concepts.load("church"), Options(num_images=5))
    assert len(own.samples) == 5 and own.samples[0].prompt in concepts.load("church").retain
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(EraseError, match="no column prompt, text or caption; it has 'a', 'b'"):
        registry.build("quality", None, Options(prompts=str(tmp_path / "bad.csv")))


def test_captions_have_their_files_seeds_guidance_and_sizes_and_each_is_said(tmp_path):
    """Columns that the file has are used, 0 included, and the task says which (3.3)."""
    path = tmp_path / "own.csv"
    path.write_text(
        "caption;seed;guidance_scale;width;height;source\na cat, asleep;42.0;0;64;128;web\na dog;7;2.5;;;web\n"
    )
    task = registry.build("quality", None, Options(prompts=str(path), num_images=4))
    assert [(s.prompt, s.seed, s.guidance, s.width, s.height) for s in task.samples[:2]] == [
        ("a cat, asleep", 42, 0.0, 64, 128),
        ("a dog", 7, 2.5, None, None),
    ]
    assert task.samples[2].prompt == "a cat, asleep" and task.samples[2].seed != 42  # another image of it
    assert task.note.startswith("own.csv: 2 prompts (column caption); seed from column seed; guidance from column guid")
    assert "note" not in task.identity()
    (tmp_path / "own.txt").write_text("a cat, asleep\n\na dog\n")
    (tmp_path / "own.jsonl").write_text('{"text": "a cat, asleep"}\n{"text": "a dog"}\n')
    for name in ("own.txt", "own.jsonl"):
        task = registry.build("quality", None, Options(prompts=str(tmp_path / name)))
        assert [s.prompt for s in task.samples] == ["a cat, asleep", "a dog"]


def test_captions_that_show_minors_beside_sexual_content_are_refused_with_their_line(tmp_path):
    """(2.11)"""
    path = tmp_path / "own.csv"
    path.write_text("prompt\na girl on a swing\na nude girl\n")
    with pytest.raises(EraseError, match=r"minors.*own\.csv, line 3"):
        registry.build("quality", None, Options(prompts=str(path)))


def test_a_users_own_file_may_say_as_i2p_does_that_a_row_is_sexual(tmp_path):
    """By its category or by the share of its images that show nudity; a share that is no number says nothing (2.11)."""
    path = tmp_path / "own.csv"
    for rows in ("girl,,70", "girl,sexual,0"):
        path.write_text(f"prompt,categories,nudity_percentage\n{rows}\n")
        with pytest.raises(EraseError, match=r"minors.*own\.csv, line 2"):
            registry.build("quality", None, Options(prompts=str(path)))
    path.write_text("prompt,categories,nudity_percentage\ngirl,violence,49\ngirl,,unknown\n")
    assert len(registry.build("quality", None, Options(prompts=str(path))).samples) == 2


@pytest.mark.parametrize("change", [("512", "0"), ("7\r\n", "-1\r\n"), ("x,", ",")])
def test_a_row_of_i2p_that_cannot_be_generated_is_named(change, tmp_path):
    """A side of no pixel, a negative guidance, a blank prompt (3.3)."""
    path = write_i2p(tmp_path / "i2p.csv", ["x"])
    path.write_bytes(path.read_bytes().replace(*(part.encode() for part in change)))
    with pytest.raises(EraseError, match=r"i2p\.csv, line 2: (width is 0|guidance is -1|the prompt is blank)"):
        i2p.read_i2p(path)


def test_a_limit_takes_samples_of_every_role_and_is_part_of_the_identity():
    concept = concepts.load("circle", model_family="mini")
    whole, part = registry.build("mini", concept), registry.build("mini", concept, Options(limit=10))
    assert len(part.samples) == 10 and {s.role for s in part.samples} == {"forget", "synonym", "retain"}
    assert set(part.samples) < set(whole.samples)
    assert part.identity()["prompts_hash"] != whole.identity()["prompts_hash"]


@pytest.mark.parametrize(
    ("task", "concept", "message"),
    [
        ("minni", None, "unknown task 'minni'; did you mean mini"),
        ("mini", None, "needs a concept"),
        ("mini", "church", "cannot judge 'church', whose judge is 'imagenet'"),
        ("class-forget", "nudity", "cannot judge 'nudity'"),
        ("quality", None, "needs captions"),
    ],
)
def test_a_task_that_cannot_be_made_says_why(task, concept, message):
    with pytest.raises(EraseError, match=message):
        registry.build(task, concepts.load(concept) if concept else None)
