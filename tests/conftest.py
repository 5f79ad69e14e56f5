"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.workspace import Workspace, stub_workspace

torch.set_num_threads(1)  # small tensors: two threads on a busy machine spend their time waiting for each other

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: with the long ones last, one of two workers would wait for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def stub(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The real graph with stages that take no time, run once: tests work in a `Workspace.twin` of it."""
    return stub_workspace(root, tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="session")
def shared(root: Path) -> Path:
    """The folder with a real CLEVRER sample and real weights beside the checkout; tests that need it skip elsewhere."""
    folder = root.parent / "shared"
    if not (folder / "clevrer").is_dir():
        pytest.skip(f"needs the real CLEVRER sample and weights in {folder}")
    return folder
