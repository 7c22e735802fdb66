"""Attack every reader for some minutes, and print each kind of fault once: `python -m tests.fuzz --minutes 60`."""

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from tests.fuzz.attack import attack
from tests.fuzz.subjects import SUBJECTS, make_shared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of subjects")
    options = parser.parse_args()
    subjects = [subject for subject in SUBJECTS if not options.only or subject.name in options.only]
    faults: Counter[str] = Counter()
    attacks: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz.") as folder:
        shared, end, number = make_shared(Path(folder)), time.monotonic() + 60 * options.minutes, 0
        place = Path(folder, "place")
        logging.disable(logging.CRITICAL)
        while time.monotonic() < end:
            for subject in subjects:
                fault = attack(subject, shared, place, Random(f"{options.seed} {subject.name} {number}"))
                attacks[subject.name] += 1
                kind = fault and " | ".join([subject.name, *fault.splitlines()[-3:]])[-300:]
                if kind and kind not in faults:
                    print(f"{subject.name} {number}: {fault}\n", flush=True)
                if kind:
                    faults[kind] += 1
            number += 1
    print(f"{attacks.total()} attacks, {faults.total()} faults of {len(faults)} kinds; {dict(attacks)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
