"""A fixture for modules whose tests set the logger up."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet_afterwards() -> Iterator[None]:
    """Take every handler off again; a module that names this fixture has it in all its tests."""
    yield
    root = logging.getLogger("megatron_kvpo")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.propagate = True
