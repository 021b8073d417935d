"""Aligns diffusion models to preferences with Diffusion-DPO (Wallace et al. 2023), training LoRA adapters only."""

__version__ = "0.1.0"

import logging

# On CPUs with bfloat16 it looks for a kernel on the network when it is imported, and complains that there is none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
