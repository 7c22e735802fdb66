"""What the tests of processes rely on: nothing outlives a test, and no wait is endless."""

import subprocess
import sys
import time

import pytest

from tests.distributed.launching import are_gone
from tests.processes import children, descendants, end, popen, started, wait_until

STARTS_ANOTHER = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"


@pytest.mark.parametrize("own_end", ["", "; import time; time.sleep(600)"])
def test_the_end_of_a_process_is_that_of_its_descendants(own_end):
    """Also of one in a session of its own whose parent has ended."""
    process = popen([sys.executable, "-c", STARTS_ANOTHER + own_end], stdout=subprocess.PIPE, text=True)
    other = int(process.stdout.readline())
    if own_end:
        assert children(process.pid) == descendants(process.pid) == [other]
    else:
        process.wait(60)
    end([process])
    assert process.poll() is not None and are_gone([other]) and process not in started()


def test_a_wait_ends_with_the_process_or_with_its_time():
    process = popen([sys.executable, "-c", "print('last words')"], stdout=subprocess.PIPE, text=True)
    with pytest.raises(AssertionError, match="last words"):
        wait_until(lambda: False, process)
    with pytest.raises(AssertionError):
        wait_until(lambda: False, limit=0.1)
    begun = time.monotonic()
    assert wait_until(lambda: time.monotonic() - begun > 0.05 and "a value") == "a value"
