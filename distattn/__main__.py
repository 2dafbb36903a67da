"""`python -m distattn`: the command `distattn`."""

import sys

from distattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
