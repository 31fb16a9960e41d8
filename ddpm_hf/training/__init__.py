"""Training: `train(TrainConfig(...))`. Read `loss.py` and `loop.py`; all else surrounds them."""

from ddpm_hf.training.loop import train
from ddpm_hf.training.loss import Batch, DenoisingLoss, Losses
from ddpm_hf.training.run import Run, TrainCallback

__all__ = ["Batch", "DenoisingLoss", "Losses", "Run", "TrainCallback", "train"]
