"""Laws of prompt files: every row is read as it is meant or refused with its line."""

import json

import pytest

from erase.data.prompt_files import PromptFile, Row, read
from erase.errors import EraseError


@pytest.fixture
def written(tmp_path):
    """`read` of a file with this content."""

    def written(content: str | bytes, name: str = "p.csv", **options) -> PromptFile:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read(path, **options)

    return written


def seeds(found: PromptFile) -> list[tuple[str, int | None]]:
    return [(row.prompt, row.seed) for row in found.rows]


ROWS = [("a red circle, on white", 42), ("a blue square", 43)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_delimiter_is_recognised(delimiter, end, written):
    """(3.3)"""
    lines = [("prompt", "seed"), ('"a red circle, on white"', "42"), ("a blue square", "43")]
    found = written(end.join(delimiter.join(line) for line in lines) + end)
    assert seeds(found) == ROWS
    assert [row.line for row in found.rows] == [2, 3]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.txt"])
def test_utf8_and_utf16_are_recognised_with_and_without_a_mark(encoding, name, written):
    """Excel writes a mark before UTF-8 and "Unicode text" in UTF-16 (3.3)."""
    text = {"p.csv": "prompt\nein rotes Häuschen\n", "p.jsonl": '{"prompt": "ein rotes Häuschen"}\n'}
    found = written(text.get(name, "ein rotes Häuschen\n").encode(encoding), name)
    assert [row.prompt for row in found.rows] == ["ein rotes Häuschen"]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *((name, "seed") for name in ("evaluation_seed", "sd_seed", "seed", "Seed")),
        *((name, "guidance") for name in ("evaluation_guidance", "sd_guidance_scale", "guidance", "guidance_scale")),
        *((name, "width") for name in ("sd_image_width", "width")),
        *((name, "height") for name in ("sd_image_height", "height")),
    ],
)
def test_every_name_of_a_field_is_taken_and_said(name, field, written):
    """Also "8.0", as pandas writes whole numbers beside a gap (3.3)."""
    for value in ("8", "8.0", " 8 "):
        found = written(f"text,{name},style\na circle,{value},flat\n")
        assert getattr(found.rows[0], field) == 8 and found.rows[0].facts == {"style": "flat"}
        assert found.columns == {"prompt": "text", field: name}
        assert found.summary().startswith(f"p.csv: 1 prompt (column text); {field} from column {name}; ")
    line = json.dumps({"prompt": "a circle", name: 8.0})
    assert getattr(written(line, "p.jsonl").rows[0], field) == 8


def test_the_summary_counts_rows_and_says_what_the_file_does_not_give(written):
    found = written("prompt,seed,guidance\na,1,0\nb,,7.5\nc,3,\n")
    assert [row.guidance for row in found.rows] == [0.0, 7.5, None]  # 0 is 0, and a blank is no guidance
    assert found.summary() == (
        "p.csv: 3 prompts (column prompt); seed from column seed (2 of 3 rows); "
        "guidance from column guidance (2 of 3 rows); width, height not given"
    )
    assert written("a\nb\n", "p.txt").summary() == "p.txt: 2 prompts; seed, guidance, width, height not given"


def test_words_that_other_readers_take_for_nothing_are_prompts(written):
    words = ["Null", "NA", "nan", "None", "two\nlines", 'a "quote", a comma', '6" tall', "-", "0"]
    lines = "".join('"' + word.replace('"', '""') + '",1\n' for word in words)
    assert [row.prompt for row in written("prompt,seed\n" + lines).rows] == words
    assert [row.prompt for row in written('prompt,seed\n6" tall,1\n').rows] == ['6" tall']


def test_a_file_of_one_column_needs_no_quotes(written):
    """A comma can be nothing but the prompt's own there (3.3)."""
    assert seeds(written("caption\na red circle, on white\n\na blue square\n")) == [(p, None) for p, _ in ROWS]


HEADER = "prompt,evaluation_seed\n"
BAD = {
    "unquoted comma": (HEADER + "a,1\na red circle, on white,42\n", "line 3: 3 fields, but the header has 2 .*quotes"),
    "missing field": (HEADER + "a red circle\non white,42\n", "line 2: 1 field, but the header has 2"),
    "other delimiter": (HEADER + "a red circle;42\n", "line 2: 1 field, but the header has 2"),
    "open quote": (HEADER + 'b,1\n"a red circle,42\na blue square,43\n', "line 3: a quote that opens here"),
    "two stray quotes": (HEADER + '"a red circle,42\na blue square,43\n",44\n', "line 2: a quote .* row of its own"),
    "quote inside": (HEADER + '"a red" circle,42\n', "line 2: a quote that opens here is not closed as it must be"),
    "blank": (HEADER + "a,1\n   ,6\n", "line 3: the prompt is blank"),
    "blank and no seed": (HEADER + ",\n", "line 2: the prompt is blank"),
    "header only": (HEADER, r"has a header \(prompt, evaluation_seed\) but no rows$"),
    "empty": ("", "is empty$"),
    "white space": ("\n \n", "is empty$"),
    "no prompt column": ("a,b\n1,2\n", "has no column prompt, text or caption; it has 'a', 'b'"),
    "no header": ("a red circle,42\n", "has no column prompt, text or caption; it has 'a red circle', '42'. The first"),
    "unknown delimiter": ("prompt|seed\na|1\n", "it has 'prompt|seed'. .* a comma, a semicolon or a TAB separates"),
    "two columns of a name": ("prompt,seed,seed\na,1,2\n", "has two columns 'seed'"),
    "seed too large": (HEADER + f"a,{2**64}\n", f"line 2: seed is {2**64}; it must be a number from 0 to {2**64 - 1}"),
    "seed below zero": (HEADER + "a,-1\n", "line 2: seed is -1; it must be a number from 0"),
    "part of a seed": (HEADER + "a,42.5\n", r"line 2: seed is 42\.5; it must be a whole number"),
    "no seed": (HEADER + "a,first\n", "line 2: seed is 'first'; it must be a number"),
    "endless seed": (HEADER + "a,1e999999999\n", "line 2: seed is '1e999999999'; it must be a number"),
    "nan guidance": ("prompt,guidance\na,nan\n", "line 2: guidance is 'nan'; it must be a number"),
    "infinite guidance": ("prompt,guidance\na,inf\n", "line 2: guidance is 'inf'; it must be a number"),
    "negative guidance": ("prompt,guidance\na,-0.5\n", r"line 2: guidance is -0\.5; it must be a number from 0"),
    "no size": ("prompt,width,height\na,512,0\n", "line 2: height is 0; it must be a whole number from 1 to 4096"),
    "huge size": ("prompt,width\na,8192\n", "line 2: width is 8192; it must be a whole number from 1 to 4096"),
    "latin-1": (HEADER.encode() + "é,1\n".encode("latin-1"), "line 2: this is not utf-8 text; save the file as UTF-8"),
    "binary": (b"prompt,seed\na\0b,1\n", "is not a text file"),
    "huge field": (HEADER + "a" * 200_000 + ",1\n", "line 2: a field has more than 131,072 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_doubtful_is_refused_with_its_line(case, written):
    """(3.3, 4.10)"""
    content, message = BAD[case]
    with pytest.raises(EraseError, match=message):
        written(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2: .*each line must be one JSON object"),
        ('{"prompt": "a"}\n\n["b"]\n', "line 3: each line must be one JSON object, not"),
        ('{"prompt": 7}\n', "line 1: the prompt is 7; it must be a string"),
        ('{"prompt": "a"}\n{"caption": "b"}\n', "line 2: the prompt is blank"),
        ('{"caption_of": "a"}\n', "has no column prompt, text or caption; it has 'caption_of'"),
        ('{"prompt": "a", "seed": true}\n', "line 1: seed is 'True'; it must be a number"),
        ('{"prompt": "a", "seed": [1]}\n', "line 1: seed is"),
        ('{"prompt": "a", "guidance": NaN}\n', "line 1: guidance is 'nan'; it must be a number"),
        ("[" * 100_000, "line 1: .*each line must be one JSON object"),
    ],
)
def test_a_json_line_that_cannot_be_used_is_named(content, message, written):
    """(3.3, 4.10)"""
    with pytest.raises(EraseError, match=message):
        written(content, "p.jsonl")


def test_a_folder_and_a_missing_file_are_one_line(tmp_path):
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none.csv", "No such file")):
        with pytest.raises(EraseError, match=message):
            read(path)


def test_blank_prompts_are_kept_only_on_request(written):
    assert written(HEADER + ",1\n", allow_blank=True).rows == (Row(2, "", 1),)


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.txt"])
def test_no_changed_bytes_end_in_anything_but_rows_or_one_line(name, written, mutants):
    """150 mutants of each kind, with a fixed seed (4.10)."""
    table = 'prompt,seed,guidance,width,note\n"a red circle, on white",42,7.5,512,"x\ny"\na blue square,43,0,64,\n'
    objects = (
        '{"file_name": "a.png", "text": "a circle", "seed": 42}\n{"file_name": "b.png", "text": "é", "seed": 43.0}\n'
    )
    content = {"p.csv": table, "p.jsonl": objects}.get(name, "a red circle\na blue square\n").encode()
    refused = 0
    for mutant in mutants(content, 150):
        try:
            rows = written(mutant, name).rows
        except EraseError:
            refused += 1
        else:
            assert rows and all(row.prompt.strip() for row in rows)
    assert refused > (5 if name == "p.txt" else 50)  # control: mutants do damage
