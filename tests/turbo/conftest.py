"""Nano models, shared by all tests of a process; see tests/tiny_models.py."""

from pathlib import Path

import pytest
import tiny_models

from turbo.model import VisionLanguageModel


@pytest.fixture(scope="session")
def random_folder() -> Path:
    return tiny_models.random_folder()


@pytest.fixture(scope="session")
def fitted_folder() -> Path:
    return tiny_models.fitted_folder()


@pytest.fixture(scope="session")
def vlm() -> VisionLanguageModel:
    """A random nano model."""
    return tiny_models.random_model()


@pytest.fixture(scope="session")
def fitted() -> VisionLanguageModel:
    """A nano model whose answers on numberline are partly legal."""
    return tiny_models.fitted_model()
