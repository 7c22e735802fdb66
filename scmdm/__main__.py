"""`python -m scmdm`."""

import sys

from scmdm.cli import main

if __name__ == "__main__":  # spawned worker processes import this module
    sys.exit(main())
