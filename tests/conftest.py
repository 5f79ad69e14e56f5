"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: two threads on a busy machine spend their time waiting for each other

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared(root: Path) -> Path:
    """The folder with a real CLEVRER sample and real weights beside the checkout; tests that need it skip elsewhere."""
    folder = root.parent / "shared"
    if not (folder / "clevrer").is_dir():
        pytest.skip(f"needs the real CLEVRER sample and weights in {folder}")
    return folder
