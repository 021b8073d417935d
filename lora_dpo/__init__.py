"""Aligns diffusion models to preferences with Diffusion-DPO (Wallace et al. 2023), training LoRA adapters only."""

__version__ = "0.1.0"
