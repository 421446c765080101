"""constraints-lowest.txt names the lowest versions that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_lowest_constraints_are_the_lower_bounds_of_every_dependency():
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {}
    for need in needs:
        found = re.match(r"([\w-]+)>=([\d.]+)", need)
        assert found, f"{need} has no lower bound"
        bounds[found[1]] = found[2]
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert lowest.keys() == bounds.keys()
    for name, version in lowest.items():
        assert re.fullmatch(rf"{re.escape(bounds[name])}(\.0)*", version), name
