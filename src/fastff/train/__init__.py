"""Training: data and its masking."""
