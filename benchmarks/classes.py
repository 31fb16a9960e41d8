"""How many samples are the digit that was asked for, by guidance: `python benchmarks/classes.py MODEL`.

MODEL is the folder of a finished run of `--config digits-classes`. The protocol is that of
`ddpm_hf.evaluation.legibility.digits_legibility`, 200 samples at each guidance.
"""

import sys

from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.evaluation.legibility import digits_legibility

SAMPLES, STEPS = 200, 50

pipeline = DDPMCustomPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
print("guidance  as asked  legible")
for guidance in (0, 1, 1.5, 2, 3, 4, 6, 8):
    told = digits_legibility(pipeline, STEPS, seed=1, num_samples=SAMPLES, guidance_scale=guidance)
    print(f"{guidance:8g}  {told.accuracy:8.1%}  {told.samples:7.1%}", flush=True)
