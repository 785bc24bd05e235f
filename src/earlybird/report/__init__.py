"""The report: one HTML file, made from run folders, that shows what a training spent and what it reached.

The file holds its style, its data and plotly.js, and asks the network for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from earlybird.errors import InputError
from earlybird.files import write_text

__all__ = ["write"]


def write(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of one or several runs.

    Args:
        runs: Run folders, or folders that hold some, such as that of a comparison. Runs that differ only in their
            seed are shown as one contender, with the spread.
        out: The HTML file; an older report is replaced, anything else is not.

    Returns:
        ``out``.

    Raises:
        InputError: A folder holds no run, a file in it is damaged, or ``out`` is something else than a report.
    """
    import jinja2
    import plotly

    from earlybird import __version__
    from earlybird.report.page import compose
    from earlybird.report.read import read, read_points, read_verifications

    out = Path(out)
    _check_target(out)
    folders = [Path(run) for run in runs]
    page, charts = compose(read(folders), read_points(folders), read_verifications(folders))
    source = files("earlybird.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(source.joinpath("page.html.j2").read_text("utf-8")).render(
        page=page,
        charts=charts,
        css=_raw(source.joinpath("page.css").read_text("utf-8")),
        js=_raw(source.joinpath("page.js").read_text("utf-8")),
        plotly=_raw(files(plotly).joinpath("package_data", "plotly.min.js").read_text("utf-8")),
        version=__version__,
    )
    return write_text(out, html)


def _check_target(out: Path) -> None:
    if out.is_dir():
        raise InputError(f"{out} is a folder", needed="a file name", hint=f"write --out {out / 'report.html'}")
    if out.exists():
        with open(out, encoding="utf-8", errors="replace") as file:
            if 'name="generator" content="earlybird' not in file.read(2000):
                raise InputError(f"{out} exists and is no earlybird report", hint="choose another --out")


def _raw(text: str) -> object:
    """Mark text of our own, or of plotly, as safe inside a style or script element."""
    import markupsafe

    # the only thing that could end the element early
    return markupsafe.Markup(re.sub(r"</(script|style)", r"<\\/\1", text, flags=re.IGNORECASE))
