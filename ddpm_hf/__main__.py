"""`python -m ddpm_hf` is `ddpm-hf`."""

import sys

from ddpm_hf.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
