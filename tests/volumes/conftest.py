"Four small bodies and their store, shared by the tests of this wing."
import pytest

from synthpi.volumes.bodies import write_bodies
from synthpi.volumes.scans import prepare_volumes

@pytest.fixture(scope="session")
def bodies(tmp_path_factory):
    return write_bodies(
        tmp_path_factory.mktemp("bodies"), n_subjects=4, shape=(40, 30, 36), spacing_mm=11.0, seed=4
    )

@pytest.fixture(scope="session")
def store(bodies, tmp_path_factory):
    return prepare_volumes(bodies, tmp_path_factory.mktemp("store") / "s")
