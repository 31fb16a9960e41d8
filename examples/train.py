"""Train a model: `accelerate launch examples/train.py [--config mnist] [--learning_rate 2e-4] ...`

Without arguments it trains on the 8x8 digits that come with scikit-learn and leaves everything in runs/digits.
The same as `ddpm-hf train`; here as a script, because that is what `accelerate launch` starts.
"""

import sys

from ddpm_hf.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
