"""The templates of the HTML reports."""

from pathlib import Path
from typing import Any

from cnn_jax.report.plots import COLORS
from cnn_jax.report.tables import format_metric


def render(path: Path, template: str, **values: Any) -> None:
    """Write a report as an HTML file, with all values escaped except ``Markup``.

    Args:
        path: the file to write.
        template: the name of its template, which extends ``base.html.j2``.
        **values: the template's variables.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cnn_jax", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric": format_metric}
    environment.globals |= {"colors": COLORS}
    html = environment.get_template(template).render(**values)
    # A path in the settings may not be valid Unicode.
    path.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")
