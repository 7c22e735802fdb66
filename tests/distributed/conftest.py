import functools

import pytest

from scmdm.cli import main
from tests.distributed.parity import adapt_arguments


@pytest.fixture(scope="package")
def adapt(base, molecules, empty_yaml):
    """The arguments of an adaptation into a run directory, with overrides."""
    return functools.partial(_arguments, base, molecules, empty_yaml)


def _arguments(base, molecules, config, run, *overrides):
    return adapt_arguments(run, base, molecules, config, *overrides)


@pytest.fixture(scope="package")
def single(tmp_path_factory, adapt):
    """Reference run in one process."""
    run = tmp_path_factory.mktemp("runs") / "single"
    assert main(adapt(run, "train.micro_batch_size=64")) == 0
    return run
