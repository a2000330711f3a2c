"""Whole models for inference without PyTorch: exported to OpenVINO, or run by the native engine."""
