"""No file of a stranger ends in a traceback, a hang, or a change of files elsewhere. `python -m tests.fuzz` goes on."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.attack import attack
from tests.fuzz.subjects import SUBJECTS, make_shared

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_change_is_read_or_refused(subject, shared, tmp_path):
    @settings(max_examples=20, database=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def changed(seed):
        assert attack(subject, shared, tmp_path / "place", Random(seed)) is None

    changed()
