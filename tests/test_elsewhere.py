"""Laws of other machines and users: no home folder, files and terminals that refuse or mislead."""

from pathlib import Path

import pytest
import torch

from erase import cli, delta, files, masks
from erase.cli import load_line
from erase.commandline import reporting
from erase.errors import EraseError


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    """(4.7)"""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("ERASE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(EraseError, match="^this user has no home folder; say where to keep caches by ERASE_CACHE=DIR$"):
        files.default_cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert files.default_cache_dir() == Path("/caches/erase-concept")
    monkeypatch.setenv("ERASE_CACHE", "/own")
    assert files.default_cache_dir() == Path("/own")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (NotADirectoryError(20, "Not a directory", "/dev/null/x"), "/dev/null/x: Not a directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(30, "Read-only file system", "/ro"), "/ro: Read-only file system"),
        (EraseError("a\n b"), "a b"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line, capsys):
    """(4.7, 4.10)"""
    with pytest.raises(SystemExit) as end, reporting("prog"):
        raise error
    assert end.value.code == 2 and capsys.readouterr().err == f"prog: {line}\n"


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), RuntimeError("defect"), KeyError("x")])
def test_defects_stay_tracebacks(error):
    with pytest.raises(type(error)), reporting("prog"):
        raise error


# --- text of files on the terminal


def test_inspect_escapes_what_a_file_says(tmp_path, capsys):
    """A delta of anybody's may name its concept as it likes. (4.11)"""
    hostile = "\x1b]0;title\x07\x1b[31m\n‮"
    change = delta.difference(
        {"unet.w": torch.zeros(4)}, {"unet.w": torch.ones(4)}, {"base": hostile, "concept": {"name": hostile}}
    )
    delta.save(tmp_path / "delta.safetensors", change)
    masks.save(tmp_path / "mask.safetensors", {"w": torch.ones(4, dtype=torch.bool)}, {"base": hostile})
    for name in ("delta", "mask"):
        cli.main(["inspect", str(tmp_path / f"{name}.safetensors")])
        out = capsys.readouterr().out
        assert all(line.isprintable() for line in out.splitlines()) and r"\x1b]0;title\x07" in out


def test_errors_escape_what_an_argument_says(capsys):
    """(4.11)"""
    with pytest.raises(SystemExit):
        cli.main(["--concept", "\x1b[31mzebra\nx"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable()


@pytest.mark.parametrize("name", ["runs/circle", "a b", "it's", 'say "hi"', "back\\slash", "new\nline", "{x}"])
def test_the_line_that_loads_a_model_works_when_pasted(name, monkeypatch):
    """(2.7)"""
    from diffusers import StableDiffusionPipeline

    from erase.families import loading, sd

    monkeypatch.setattr(loading, "family_of", lambda folder: sd.StableDiffusion)
    seen: list[str] = []
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda path, **_: seen.append(path))
    exec(load_line(Path(name)), {})
    assert seen == [name] and "\n" not in load_line(Path(name))
