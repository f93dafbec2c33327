"""The mathematics of DiffoRA and RM-LoRA in plain PyTorch, without Lightning, Hydra or transformers."""
