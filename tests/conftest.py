"""Settings of all tests, and the store that they share.

One CPU thread a process: two threads on small tensors mostly wait for each other, and two processes run tests side by
side.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import children
import pytest
from hypothesis import settings

from storage.store import Store

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; children inherit it

settings.register_profile("ci", derandomize=True, deadline=None)  # the same examples in every run
settings.register_profile("deep", max_examples=1000, deadline=None)  # others in every run; make test-faults
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes run the tests, let them share one fork server, which starts with them."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        children.start_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that the many short ones keep both processes busy to the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for all tests of a run, also those of another process: what one has built the others find.

    Tests may add to it, by `tiny.build`; to change or delete an artefact they copy it (`tiny.copy_artefacts`).
    """
    folder = tmp_path_factory.getbasetemp()
    store = Store((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared store")
    yield store
    for ref in store.refs():
        assert store.verify(ref) == [], "a test has changed what others read"
