"""A few minutes on a CPU that train a small model with trees beside its dense twin and baselines, and write a report.

python examples/train_tiny [--quick] [--seconds 270] [--out train-tiny-report]
"""
