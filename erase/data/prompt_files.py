"""The reader of prompt files: CSV (comma, semicolon or TAB), .jsonl (one object a line), .txt (one prompt a line).

    found = read("captions.csv")
    found.rows[0].prompt, found.rows[0].seed, found.rows[0].facts["categories"]
    print(found.summary())     captions.csv: 30 prompts (column caption); seed from column seed; guidance, ... not given

What is doubtful is refused with its line and never repaired by a guess.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from erase.errors import EraseError

COLUMNS = {  # the names of each field in order of preference; compared without regard to case
    "prompt": ("prompt", "text", "caption"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "width": ("sd_image_width", "width"),
    "height": ("sd_image_height", "height"),
}
DELIMITERS = ",;\t"
MAX_SEED = 2**64 - 1  # torch's
MAX_SIDE = 4096  # of an image in pixels; which sides a model generates is asked of its family


@dataclass(frozen=True)
class Row:
    """One prompt.

    line: of the file, from 1, where the row begins. seed, guidance, width, height: None where the file gives none.
    facts: all other columns by their names.
    """

    line: int
    prompt: str
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PromptFile:
    """The rows of a file, at least one, and the column that each field is taken from."""

    path: Path
    rows: tuple[Row, ...]
    columns: Mapping[str, str]

    def summary(self) -> str:
        """What was read, in one line: how many rows and which columns give seeds, guidance and sizes."""
        given, absent = [], []
        for name in ("seed", "guidance", "width", "height"):
            num = sum(getattr(row, name) is not None for row in self.rows)
            if not num:
                absent.append(name)
                continue
            part = "" if num == len(self.rows) else f" ({num} of {len(self.rows)} rows)"
            given.append(f"{name} from column {self.columns[name]}{part}")
        if absent:
            given.append(f"{', '.join(absent)} not given")
        prompts = f"{len(self.rows):,} prompt{'s' * (len(self.rows) != 1)}"
        column = f" (column {self.columns['prompt']})" if self.columns else ""
        return f"{self.path.name}: {prompts}{column}; {'; '.join(given)}"


def read(path: str | Path, *, allow_blank: bool = False, prompts_only: bool = False) -> PromptFile:
    """All rows of a prompt file; its suffix says which kind it is (.txt, .jsonl; anything else is CSV).

    A prompt "NaN" or "Null" is a text like any other. UTF-8 and UTF-16 are recognised.

    allow_blank: keep rows with a blank prompt, which are an error otherwise (blank lines of a .txt file are skipped).
    prompts_only: take no seeds, guidance or sizes; such columns are facts like any other.

    Raises:
        EraseError: the file cannot be read, or a row of it; the message names the line.
    """
    path = Path(path)
    text = text_of(path)
    if not text.strip():
        raise EraseError(f"{path} is empty")
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = enumerate(io.StringIO(text, newline=None), start=1)
        return PromptFile(path, tuple(Row(number, line.strip()) for number, line in lines if line.strip()), {})
    records = list(_jsonl(path, text) if suffix == ".jsonl" else _csv(path, text))
    names = list(dict.fromkeys(name for _, record in records for name in record))
    columns = _columns(names)
    if "prompt" not in columns:
        raise EraseError(_no_prompt_column(path, names))
    if prompts_only:
        columns = {"prompt": columns["prompt"]}
    taken = set(columns.values())
    rows = []
    for line, record in records:
        fields = {name: record.get(column, "") for name, column in columns.items()}
        where = f"{path}, line {line}"
        facts = {name: value for name, value in record.items() if name and name not in taken}
        rows.append(_row(where, line, fields, facts, allow_blank))
    return PromptFile(path, tuple(rows), columns)


def _columns(names: Sequence[str]) -> dict[str, str]:
    """The name in the file of each field that it has."""
    known = {name.casefold(): name for name in reversed(names)}
    found = {key: next((known[name] for name in wanted if name in known), None) for key, wanted in COLUMNS.items()}
    return {key: name for key, name in found.items() if name is not None}


def _no_prompt_column(path: Path, names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:20])
    return (
        f"{path} has no column prompt, text or caption; it has {shown}. "
        "The first line names the columns, which a comma, a semicolon or a TAB separates"
    )


def _row(where: str, line: int, fields: Mapping[str, Any], facts: Mapping[str, Any], allow_blank: bool) -> Row:
    prompt = fields["prompt"]
    if prompt is None:
        prompt = ""
    if not isinstance(prompt, str):
        raise EraseError(f"{where}: the prompt is {prompt!r}; it must be a string")
    if not prompt.strip() and not allow_blank:
        raise EraseError(f"{where}: the prompt is blank; write one or remove the line")
    guidance = _number(where, "guidance", fields.get("guidance"))
    return Row(
        line,
        prompt,
        _whole(where, "seed", fields.get("seed"), MAX_SEED),
        None if guidance is None else float(guidance),
        *(_side(where, name, fields.get(name)) for name in ("width", "height")),
        facts=facts,
    )


def _number(where: str, name: str, value: Any) -> Decimal | None:
    if value is None or isinstance(value, str) and not value.strip():
        return None
    try:
        number = Decimal(str(value).strip()) if isinstance(value, str | int | float) else None
    except InvalidOperation:
        number = None
    if number is None or isinstance(value, bool) or not math.isfinite(number):
        raise EraseError(f"{where}: {name} is {str(value)[:40]!r}; it must be a number")
    if number < 0 or number > MAX_SEED:
        raise EraseError(f"{where}: {name} is {str(value)[:40]}; it must be a number from 0 to {MAX_SEED}")
    return number


def _whole(where: str, name: str, value: Any, highest: int) -> int | None:
    number = _number(where, name, value)
    if number is None:
        return None
    if number != int(number) or number > highest:
        raise EraseError(f"{where}: {name} is {str(value)[:40]}; it must be a whole number from 0 to {highest}")
    return int(number)


def _side(where: str, name: str, value: Any) -> int | None:
    side = _whole(where, name, value, MAX_SEED)
    if side is not None and not 0 < side <= MAX_SIDE:
        raise EraseError(f"{where}: {name} is {side}; it must be a whole number from 1 to {MAX_SIDE}")
    return side


# --- text -----------------------------------------------------------------------------------------------------------


def text_of(path: Path) -> str:
    """The text of a file in UTF-8 or UTF-16.

    Raises:
        EraseError: it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EraseError(f"{path}: {error.strerror or error}") from error
    encoding = "utf-8"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif len(content) > 1 and content[1] == 0:  # UTF-16 without its mark: the first letter's other byte
        encoding = "utf-16-le"
    elif content[:1] == b"\0":
        encoding = "utf-16-be"
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EraseError(f"{path}, line {line}: this is not {encoding} text; save the file as UTF-8") from error
    if "\0" in text:
        raise EraseError(f"{path} is not a text file; save it as CSV in UTF-8")
    return text


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EraseError(f"{path}, line {number}: {error}; each line must be one JSON object") from error
        if not isinstance(value, dict):
            raise EraseError(f"{path}, line {number}: each line must be one JSON object, not {line.strip()[:40]!r}")
        yield number, value


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    delimiter = max(DELIMITERS, key=lambda mark: _header_score(text, mark))
    records = _records(path, text, delimiter)
    *_, header = next(records)
    header = [name.strip() for name in header]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise EraseError(f"{path} has two columns {twice!r}; rename or remove one")
    if "prompt" not in _columns(header):
        raise EraseError(_no_prompt_column(path, header))
    seed = header.index(_columns(header)["seed"]) if "seed" in _columns(header) else None
    lines = list(io.StringIO(text, newline=""))
    num = 0
    for line, last, values in records:
        if len(header) == 1 and len(values) > 1 and last == line and '"' not in lines[line - 1]:
            values = [lines[line - 1].strip()]  # the only column: the whole line is the prompt
        if len(values) != len(header):
            has = f"{len(values)} field{'s' * (len(values) != 1)}"
            raise EraseError(
                f"{path}, line {line}: {has}, but the header has {len(header)} ({', '.join(header)[:80]}); "
                "put quotes around a prompt that contains a separator"
            )
        for number in range(line, last):
            parts = lines[number - 1].split(delimiter)
            if seed is not None and len(parts) == len(header) and parts[seed].strip().isdigit():
                raise EraseError(
                    f"{path}, line {line}: a quote that opens here is closed in line {last} only, but line {number} "
                    "looks like a row of its own; close the quote or remove it"
                )
        num += 1
        yield line, dict(zip(header, values, strict=True))
    if not num:
        raise EraseError(f"{path} has a header ({', '.join(header)[:80]}) but no rows")


def _header_score(text: str, delimiter: str) -> tuple[bool, int]:
    """How well a delimiter fits the first line: whether it leaves a prompt column, and how many columns."""
    first = text.lstrip("\r\n").splitlines()[0]
    names = [name.strip().strip('"') for name in first.split(delimiter)]
    return "prompt" in _columns(names), len(names)


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Each record that is not blank, with its first and its last line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger" in str(error):
                raise EraseError(
                    f"{path}, line {line}: a field has more than {csv.field_size_limit():,} characters; shorten it, or "
                    "close the quote that opens it"
                ) from error
            raise EraseError(
                f"{path}, line {line}: a quote that opens here is not closed as it must be ({error}); "
                "close it, remove it, or double the quotes inside a text"
            ) from error
        if values:
            yield line, reader.line_num, values
