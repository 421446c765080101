"""HTML from the templates in `templates/`."""

from pathlib import Path
from typing import Any

from erase.evaluation.report.words import as_json

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **view: Any) -> str:
    """The text of a template with these values."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # prompts and names come from users
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = lambda value: value if isinstance(value, str) else as_json(value)
    return environment.get_template(template).render(**view)
