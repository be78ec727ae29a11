"""What a run shows in Prefect's own pages: the report's scores as a table, and its preview picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.report.page import SETTINGS, percent
from pipeline.report.pictures import TITLES, data_url
from pipeline.report.write import PREVIEW, headline
from pipeline.scoring.records import Report
from storage.errors import counted


def score_rows(report: Report) -> list[dict[str, str]]:
    """The report's headline, one row a setting, numbers in percent."""
    return [
        {"percent": setting.name} | {name: percent(getattr(report.rows[key], name)) for name in headline(report)}
        for key, setting in SETTINGS.items()
    ]


def summary(done: Mapping[str, str]) -> str:
    """How many stages a run found and made, and which: `done` gives "cached" or "built" by stage."""
    parts = []
    for kind in ("cached", "built"):
        names = [stage for stage, how in done.items() if how == kind]
        parts.append(f"{len(names)} {kind}" + (f" ({', '.join(names)})" if names else ""))
    return f"{counted(len(done), 'stage')}: {', '.join(parts)}"


def preview(folder: Path) -> str:
    """The preview picture of the report in `folder` as Markdown that holds it; "" where the report has none."""
    path = folder / PREVIEW
    if not path.exists():
        return ""
    columns = f"{', '.join(TITLES)}; unseen classes are outlined in red"
    return f"{columns}\n\n![{columns}]({data_url(path.read_bytes(), 'jpeg')})"
