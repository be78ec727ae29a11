"""`zs-seg view`: the browser over a run's validation images, made once for each report, in runs/RUN/view."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from urllib.parse import quote

from flows.request import open_runtime, open_store
from storage import names
from storage.errors import UserError
from storage.keys import Ref
from storage.store import Store


def view(options: argparse.Namespace) -> int:
    from flows.pages import HOST, serve_pages
    from pipeline.report.view import INDEX, is_fresh, write_versus, write_view
    from pipeline.report.write import VIEW, link_view

    store = open_store(options)
    if len(options.runs) > 2:
        raise UserError(f"{len(options.runs)} runs are given; at most two lie side by side")
    found = [_report(store, text) for text in options.runs]
    if len(found) == 2 and found[0] == found[1]:
        raise UserError(f"{options.runs[0]} and {options.runs[1]} are one report; name another run, or one alone")
    folders: list[Path] = []
    for name, report in found:
        folders.append(Path("runs") / name / VIEW)
        if not is_fresh(folders[-1], report):
            write_view(folders[-1], name=name, store=store, report=report, runtime=open_runtime(options))
        link_view(folders[-1].parent)
    page = folders[0] / INDEX
    if len(found) == 2:
        page = write_versus(*folders, names=(found[0][0], found[1][0]))
    if not options.serve:
        print(f"pages of {' and '.join(name for name, _ in found)}: {page}")
        return 0
    with serve_pages(Path("runs"), options.port, cure="pass another --port") as server:
        path = quote(os.path.relpath(page, "runs"))
        print(f"serving http://{HOST}:{server.server_address[1]}/{path}; stop with Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _report(store: Store, text: str) -> tuple[str, Ref]:
    """The report that `text` is for, and the name of its folder: the run's, else its key."""
    named, report = names.named(store, text), names.find(store, text, kind="report")
    if report.kind != "report":
        raise UserError(f"{report} is no report; name a run, or the key of a report (`zs-seg list --kind report`)")
    return (report.key if isinstance(named, Ref) else named.name), report
