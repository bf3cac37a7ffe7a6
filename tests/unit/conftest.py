"""Fixtures of the tests of exports."""

import pytest

from tests.support.conversion import convert, save_small_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """(checkpoint, its export) of a model that grew."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = save_small_model(folder, tau_scale=0.7)
    assert convert("megatron_tf", "hf", checkpoint, folder / "model") == 0
    return checkpoint, folder / "model"
