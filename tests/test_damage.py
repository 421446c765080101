"""Damaged files of an evaluation: whichever command reads one, it ends with one line and exit code 2."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arms import Stub, make_arm

from erase.evaluation import cli, jsonl
from erase.evaluation.judges import registry as judging
from erase.evaluation.judges import thumbnails

Damage = Callable[[bytes], bytes]


def _with(**changes: Any) -> Damage:
    """Other values for keys of the (first line's) JSON object; keys with __ reach into it."""

    def change(data: bytes) -> bytes:
        text = data.decode()
        is_lines = not text.startswith("{\n")
        first, rest = text.split("\n", 1) if is_lines else (text, "")
        value = json.loads(first)
        for name, new in changes.items():
            *way, last = name.split("__")
            inner = value
            for key in way:
                inner = inner[key]
            inner[last] = new
        return (json.dumps(value) + "\n" + rest).encode()

    return change


ANY: dict[str, Damage] = {
    "empty list": lambda data: b"[]\n",
    "number": lambda data: b"7\n",
    "null": lambda data: b"null\n",
    "no utf-8": lambda data: b"\xff\xfe" + data,
    "zeros": lambda data: b"\0" * len(data),
    "nested": lambda data: b"[" * 100_000 + b"\n",
    "other object": lambda data: b'{"a": 1}\n',
    "nan": lambda data: b'{"a": NaN}\n',
}
OWN: dict[str, dict[str, Damage]] = {
    "manifest.json": {
        "half": lambda data: data[: len(data) // 2],
        "task is a text": _with(task="mini"),
        "options are a list": _with(task__options=[]),
        "no target": _with(task__options={"head": "object"}),
        "no such head": _with(task__options={"head": "nose", "target": "circle"}),
        "no such task": _with(task__id="maxi"),
        "generation is null": _with(generation=None),
        "hash is a number": _with(model={"unet": 3}),
    },
    "samples.jsonl": {
        "half": lambda data: data[: len(data) // 2],
        "other prompt": _with(prompt="x"),
        "seed is a text": _with(seed="x"),
        "huge seed": _with(seed=10**400),
        "one key more": _with(nose=1),
        "line away": lambda data: data.split(b"\n", 1)[1],
    },
    "records-0-of-1.jsonl": {
        "half": lambda data: data[: len(data) // 2],
        "file is a number": _with(file=3),
        "no hash": _with(sha256=None),
        "id is a list": _with(id=["x"]),
        "unknown sample": _with(id="x"),
        "other file": _with(file="images/00001.png"),
        "outside": _with(file="../../etc/passwd"),
        "null byte": _with(file="a\0b"),
        "invalid is a list": _with(invalid=[1]),
    },
    "scores/mini.json": {"half": lambda data: data[: len(data) // 2], "text": lambda data: b'"x"'},
    "scores/mini.jsonl": {
        "half": lambda data: data[: len(data) // 2],
        "other word": _with(object="nose"),
        "word is a list": _with(object=["circle"]),
        "word is null": _with(object=None),
    },
    "scores/thumbnails.jsonl": {
        "half": lambda data: data[: len(data) // 2],
        "no base64": _with(thumbnail="%%%"),
        "too short": _with(thumbnail="AAAA"),
        "number": _with(thumbnail=1),
    },
}
CASES = [(name, how, of[how]) for name, own in OWN.items() for of in (ANY, own) for how in of]


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("arms")
    make_arm(root / "base", ["circle", "circle", "square"], ["square"] * 3)
    make_arm(root / "erased", ["square"] * 3, ["square", "square", "none"], unet="v")
    return root


def linked(folder: Path, copy: Path) -> Path:
    """A copy of an arm that shares its images."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("images"))
    (copy / "images").symlink_to(folder / "images")
    return copy


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command and returns its code and what it wrote to stderr; the judges are those of `make_arm`."""
    made = {"mini": Stub, "thumbnails": thumbnails.Thumbnails}
    monkeypatch.setattr(judging, "make", lambda name, *_, **__: made[name]())

    def run(*arguments: object) -> tuple[int, str]:
        code: Any = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("name", "how", "damage"), CASES, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_a_damaged_file_of_an_arm_is_one_line(arms, tmp_path, command, name, how, damage):
    """`report` refuses it; `score` and `verify` refuse or repair it, and never end in a traceback (4.10)."""
    erased = linked(arms / "erased", tmp_path / "erased")
    path = erased / name
    path.write_bytes(damage(path.read_bytes()))
    for arguments in (
        ("report", erased, "--base", arms / "base"),
        ("verify", erased, "--quiet"),
        ("score", erased, "--quiet"),
    ):
        code, err = command(*arguments)
        assert code in {0, 2} and "Traceback" not in err and err.count("\n") == (code == 2), err
        if arguments[0] == "report" and (name, how) not in UNREAD:
            assert code == 2 and erased.name in err, err


# an image is looked at by verify only, and the thumbnail of a forget image is compared with nothing
UNREAD = {("records-0-of-1.jsonl", how) for how in ("no hash", "other file", "outside", "null byte")}
UNREAD |= {("scores/thumbnails.jsonl", how) for how in ("no base64", "too short")}


@pytest.mark.parametrize("name", ["results.json", "outcomes.json"])
def test_a_changed_report_is_noticed_by_compare(arms, tmp_path, command, name):
    """Figures that were edited, and files that are cut or of another shape (4.10, 6.5)."""
    shutil.copytree(arms, tmp_path / "arms")
    erased, base, other = (tmp_path / "arms" / part for part in ("erased", "base", "other"))
    assert command("report", erased, "--base", base)[0] == 0
    shutil.copytree(erased, other)
    assert command("compare", erased, f"again={other}", "--output", tmp_path / "c") == (0, "")
    path = other / name
    whole = path.read_bytes()
    edited = whole.replace(b"true", b"false", 1)
    assert edited != whole
    broken = {"edited": edited, "half": whole[: len(whole) // 2], **{how: of(whole) for how, of in ANY.items()}}
    for how, data in broken.items():
        path.write_bytes(data)
        code, err = command("compare", erased, f"again={other}", "--output", tmp_path / "d")
        assert code == 2 and err.count("\n") == 1 and str(other) in err, (how, err)
    assert not (tmp_path / "d").exists()
    code, err = command("compare", erased, f"again={other}", "--output", tmp_path / "d")
    path.write_bytes(edited)
    assert "was changed since it was written" in command("compare", erased, other, "--output", tmp_path / "d")[1]


def test_random_damage_never_ends_in_a_traceback(arms, tmp_path, command):
    """Thirty files with a flipped, lost or doubled piece; the seed is fixed (4.10)."""
    rng = random.Random(0)
    names = [p.relative_to(arms / "erased") for p in (arms / "erased").rglob("*.json*")]
    for number in range(30):
        folder = linked(arms / "erased", tmp_path / str(number))
        path = folder / rng.choice(names)
        data = bytearray(path.read_bytes())
        start = rng.randrange(len(data))
        piece = slice(start, start + rng.randrange(1, 9))
        data[piece] = rng.choice([b"", bytes(data[piece]) * 2, bytes(b ^ 1 << rng.randrange(7) for b in data[piece])])
        path.write_bytes(bytes(data))
        code, err = command("report", folder, "--output", tmp_path / "out")
        assert code in {0, 2} and err.count("\n") == (code == 2), err


def test_a_lock_is_one_processs_and_is_free_when_the_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert jsonl.lock_file(first, wait=False) and not jsonl.lock_file(second, wait=False)
        first.close()
        assert jsonl.lock_file(second, wait=False)
