"""Studies of several variants: plans of pretraining runs, their GLUE scores and speed on GPUs, tokens to take along."""
