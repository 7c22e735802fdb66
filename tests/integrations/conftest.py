"""A small adapted model beside the small base."""

import pytest

from scmdm.cli import main
from tests.conftest import ADAPTED


@pytest.fixture(scope="session")
def adapted(tmp_path_factory, molecules, base, empty_yaml):
    run = tmp_path_factory.mktemp("runs") / "adapted"
    keys = [f"run_dir={run}", f"base={base}", f"data.path={molecules}", "self_conditioning.rate=1", *ADAPTED]
    assert main(["adapt", str(empty_yaml), *keys, "train.steps=5", "optimizer.conditioner_lr=0.3"]) == 0
    return run
