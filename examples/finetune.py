"""Fine-tune a model with conditional layers as any other: Transformers' Trainer, and nothing of fastff's but the model.

    pip install 'fastff[models]' accelerate
    python examples/finetune.py converted train.tsv --out tuned     # lines of LABEL<tab>TEXT

Conditional layers may have a learning rate of their own; here a tenth of the others', which in our runs gained nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer
from transformers import TrainingArguments as Arguments

import fastff.models  # noqa: F401 - Transformers knows converted models from here on
from fastff.inspect import conditional_layers


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, object]]:
    """The parameters of conditional layers at a tenth of the rate of the others."""
    slow = {id(p) for layer in conditional_layers(model).values() for p in layer.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in slow], "lr": lr},
        {"params": [p for p in parameters if id(p) in slow], "lr": lr / 10},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()

    pairs = [line.split("\t", 1) for line in options.train.read_text(encoding="utf-8").splitlines() if "\t" in line]
    labels = sorted({label for label, _ in pairs})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    examples = [
        {**tokenizer(text, truncation=True, max_length=128), "labels": labels.index(label)} for label, text in pairs
    ]
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(labels), id2label=dict(enumerate(labels))
    )
    arguments = Arguments(
        output_dir=str(options.out / "steps"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(torch.optim.AdamW(parameter_groups(model, options.lr)), None),
    )
    result = trainer.train()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"mean loss {result.training_loss:.3f} over {options.steps} steps; wrote {options.out}")


if __name__ == "__main__":
    main()
