"""UltraFastBERT: the cramming BERT with a conditional or a dense feedforward in each layer."""
