"""`python -m scmdm`."""

import sys

from scmdm.cli import main

sys.exit(main())
