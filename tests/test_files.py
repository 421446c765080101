"""The one writer: whole or not at all, never through a link, and what is read back is checked."""

import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from erase import files, tensor_files
from erase.errors import EraseError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


def header_of(path: Path) -> tuple[int, dict]:
    """Where the data begin, and the header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return 8 + length, json.loads(content[8 : 8 + length])


def test_every_dtype_comes_back_as_safetensors_own_reader_sees_it(tmp_path):
    tensors = {str(dtype): (torch.arange(15).reshape(3, 5) % 2).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).reshape(2, 3).T}
    tensor_files.write_tensors(tmp_path / "ours", tensors, {"a": "ü"})
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert tensor_files.read_metadata(tmp_path / "ours") == {"a": "ü", "content": tensor_files.content_hash(tensors)}
    tensor_files.write_tensors(tmp_path / "plain", {"w": torch.ones(3)})
    assert header_of(tmp_path / "plain")[1]["__metadata__"] == {"format": "pt"}  # transformers asks for it


@pytest.mark.parametrize("length", range(0, 70, 7))
def test_data_begin_at_a_multiple_of_64_bytes_whatever_the_headers_length(length, tmp_path):
    """Else a CPU predicts other bits from the same weights, because mapped tensors are aligned differently (2.13)."""
    tensor_files.write_tensors(tmp_path / "f", {"w": torch.arange(4.0)}, {"note": "x" * length})
    assert header_of(tmp_path / "f")[0] % 64 == 0
    assert torch.equal(tensor_files.read_tensors(tmp_path / "f")["w"], torch.arange(4.0))


def test_the_same_weights_predict_the_same_bits_with_headers_of_any_length(tmp_path):
    """Weights whose number is odd, so that each tensor begins at another place in the file (2.13)."""
    torch.manual_seed(0)
    layer = {f"{i}.w": torch.randn(97, 97) for i in range(6)} | {"b": torch.randn(3)}
    x, answers = torch.randn(5, 97), []
    for length in range(0, 64, 5):
        tensor_files.write_tensors(tmp_path / f"{length}", layer, {"note": "x" * length})
        state, y = tensor_files.read_tensors(tmp_path / f"{length}"), x
        for i in range(6):
            y = torch.tanh(y @ state[f"{i}.w"])
        answers.append(y)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("write", [files.write_text, files.write_json, "tensors", "copy", "pickle"])
def test_a_link_is_replaced_and_what_it_points_to_stays(write, tmp_path):
    """(2.12)"""
    victim, target = tmp_path / "victim", tmp_path / "folder" / "f"
    victim.write_text("mine")
    target.parent.mkdir()
    target.symlink_to(victim)
    if write == "tensors":
        tensor_files.write_tensors(target, {"w": torch.ones(1)})
    elif write == "copy":
        (tmp_path / "source").write_text("copied")
        files.copy(tmp_path / "source", target)
    elif write == "pickle":
        files.write_pickle(target, {"w": torch.ones(1)})
    else:
        write(target, "text")
    assert victim.read_text() == "mine" and not target.is_symlink() and target.stat().st_size > 3


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    files.partial(tmp_path / "f").symlink_to(tmp_path / "victim")
    with pytest.raises(EraseError, match="cannot write"):
        files.write_text(tmp_path / "f", "text")
    assert (tmp_path / "victim").read_text() == "mine"


def test_linked_folders_are_named(tmp_path):
    (tmp_path / "run" / "work").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    files.refuse_links(tmp_path / "run")
    (tmp_path / "run" / "work" / "deep").symlink_to(tmp_path / "other")
    with pytest.raises(EraseError, match="deep is a link to .*other; remove the link"):
        files.refuse_links(tmp_path / "run")


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    files.write_text(tmp_path / "f", "old")
    with pytest.raises(EraseError, match="No space left on device"), files.replacing(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def test_a_full_disk_inside_torch_save_is_one_line(tmp_path, monkeypatch):
    def full(value, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0: ...")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(EraseError, match="cannot write .*f: No space left on device.*inline_container") as caught:
        files.write_pickle(tmp_path / "f", {})
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_full_is_one_line(tmp_path):
    """A temporary file that cannot grow, whoever writes to it (4.10)."""
    with pytest.raises(EraseError, match="No space left on device"), files.replacing(tmp_path / "f"):
        with open("/dev/full", "w") as file:
            file.write("x")
            file.flush()
    with pytest.raises(EraseError, match="cannot write /dev/full/f: a folder in this path is a file"):
        files.write_text("/dev/full/f", "x")


def python(code: str, *arguments: Path | str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def test_what_a_killed_process_left_is_used_again_by_the_next(tmp_path):
    """(2.4)"""
    dies = (
        "import os, signal, sys; from pathlib import Path; from erase import files\n"
        "with files.replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert python(dies, tmp_path / "f").wait(60) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".f.partial"] and files.is_partial(tmp_path / ".f.partial")
    files.write_text(tmp_path / "f", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "whole"


def test_two_processes_that_write_one_file_never_mix(tmp_path):
    writes = (
        "import sys; from pathlib import Path; from erase import files\n"
        "for _ in range(200): files.write_text(Path(sys.argv[1]), sys.argv[2] * 5000)\n"
    )
    processes = [python(writes, tmp_path / "f", letter) for letter in "ab"]
    seen = set()
    while any(process.poll() is None for process in processes):
        if (tmp_path / "f").exists():
            seen.add((tmp_path / "f").read_text())
    assert [process.returncode for process in processes] == [0, 0]
    assert seen and seen <= {"a" * 5000, "b" * 5000}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_folder_appears_whole_and_an_abandoned_one_is_cleared(tmp_path):
    left = files.partial(tmp_path / "out")
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "old").write_text("left")
    with files.replacing_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
        assert not (tmp_path / "out").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/new"]
    with pytest.raises(EraseError, match="cannot write .*out: Directory not empty"):
        with files.replacing_folder(tmp_path / "out"):
            pass
    with pytest.raises(KeyError), files.replacing_folder(tmp_path / "other"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def damaged(content: bytes) -> dict[str, bytes]:
    """Ways in which a file of one float tensor can be damaged; the last two keep the file well formed."""
    data = bytearray(content)
    data[-3] ^= 1
    return {
        "empty": b"",
        "text": b"hello",
        "truncated": content[:-4],
        "header cut": content[:20],
        "length too long": struct.pack("<Q", 1 << 60) + content[8:],
        "flipped bit": bytes(data),
        "another shape": content.replace(b'"shape":[4,2]', b'"shape":[2,4]'),
        "another dtype": content.replace(b'"dtype":"F32"', b'"dtype":"I32"'),
        "another name": content.replace(b'"w":', b'"v":'),
    }


@pytest.mark.parametrize("kind", [*damaged(b" " * 64), "no hash"])
def test_a_damaged_file_of_our_own_is_one_line_with_its_name(kind, tmp_path):
    """(2.1, 2.2)"""
    path = tmp_path / "f.safetensors"
    tensor_files.write_tensors(path, {"w": torch.arange(8.0).reshape(4, 2)}, {"kind": "state"})
    assert tensor_files.read_own(path, kind="state")[0]["w"].shape == (4, 2)
    if kind == "no hash":
        save_file({"w": torch.zeros(4, 2)}, path, {"erase": '{"kind": "state"}'})
    else:
        content = path.read_bytes()
        assert damaged(content)[kind] != content
        path.write_bytes(damaged(content)[kind])
    with pytest.raises(EraseError, match=re.escape(str(path))) as caught:
        tensor_files.read_own(path, kind="state")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1}', '{"status": 3}', "[" * 100000, "\x00", "ÿ"])
def test_a_record_without_what_is_needed_is_one_line(text, tmp_path):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(EraseError, match="run.json"):
        files.read_json(tmp_path / "run.json", status=str)


def test_the_hash_of_tensors_knows_bits_names_and_shapes():
    w = torch.tensor([1.0, -0.0, float("nan")])
    same = {"b": torch.ones(1), "a": w}
    assert tensor_files.content_hash({"a": w.clone(), "b": torch.ones(1)}) == tensor_files.content_hash(same)
    others = [{"a": w}, {"a": w[None], "b": torch.ones(1)}, {"a": w.abs(), "b": torch.ones(1)}, {"c": w}]
    assert len({tensor_files.content_hash(other) for other in [same, *others]}) == 5
    assert tensor_files.content_hash({"n": torch.from_numpy(np.zeros(0))})
