"""`python -m cl` is the same as `cl`."""

import sys

from cl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
