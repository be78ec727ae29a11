"""What a run shows in Prefect's own pages: the report's scores as a table, and its preview picture."""

from __future__ import annotations

from pathlib import Path

from pipeline.report.page import SETTINGS, percent
from pipeline.report.pictures import TITLES, data_url
from pipeline.report.write import PREVIEW, headline
from pipeline.scoring.records import Report


def score_rows(report: Report) -> list[dict[str, str]]:
    """The report's headline, one row a setting, numbers in percent."""
    return [
        {"percent": setting.name} | {name: percent(getattr(report.rows[key], name)) for name in headline(report)}
        for key, setting in SETTINGS.items()
    ]


def preview(folder: Path) -> str:
    """The preview picture of the report in `folder` as Markdown that holds it; "" where the report has none."""
    path = folder / PREVIEW
    if not path.exists():
        return ""
    columns = f"{', '.join(TITLES)}; unseen classes are outlined in red"
    return f"{columns}\n\n![{columns}]({data_url(path.read_bytes(), 'jpeg')})"
