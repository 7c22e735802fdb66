"""`scmdm` whose ranks are dead after ten seconds of silence, and whose collectives may take no longer than five.

`python -m tests.distributed.quick_heartbeat RANK SECONDS FILE ARGUMENT ...`: rank RANK creates FILE when it begins to
estimate a NELBO, and computes for SECONDS longer than the others. The environment's HANG_MINUTES is how long a rank may
compute without progress.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from scmdm.cli import main
from scmdm.evaluation import divided_nelbo
from scmdm.runtime import watchdog
from scmdm.sampling import model_loading
from scmdm.system import rank_heartbeat


def run(rank, seconds, file, *arguments):
    rank_heartbeat.BEAT_S, rank_heartbeat.SILENCE_LIMIT_S = 0.5, 10.0
    watchdog._SHARE_MINUTES = float(os.environ.get("HANG_MINUTES", watchdog._SHARE_MINUTES))
    model_loading.LONGEST_COLLECTIVE = timedelta(seconds=5)
    terms = divided_nelbo.nelbo_terms

    def slow(*given, **options):
        if os.environ["RANK"] == rank and not Path(file).exists():
            Path(file).touch()
            time.sleep(float(seconds))
        return terms(*given, **options)

    divided_nelbo.nelbo_terms = slow
    return main(list(arguments))


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
