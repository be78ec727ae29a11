"""Run `zs-seg` in a new process, and report what it took: `children.command(probe, FOLDER, ...)`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import Any

from flows.cli import main


def probe(folder: str, *words: str) -> None:
    """Print what the command prints, then a line of JSON: how often it opened each file in `folder`, the modules it
    imported, and the CPU seconds it and its imports took."""
    opened = Counter[str]()

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(folder + os.sep):
            opened[str(arguments[0])] += 1

    sys.addaudithook(hear)
    status = main(words)
    print(json.dumps({"opened": opened, "modules": sorted(sys.modules), "seconds": time.process_time()}))
    sys.exit(status)
