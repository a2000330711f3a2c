"""Checkpoints of pbelcak/UltraFastBERT: their configuration and their tensors."""
