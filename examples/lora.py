"""LoRA on a converted decoder with PEFT: attention is adapted, conditional layers stay as they are.

pip install 'fastff[models]' peft
python examples/lora.py converted-decoder lines.txt --out adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastff.models  # noqa: F401 - Transformers knows converted models from here on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("lines", type=Path, help="text, one example a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    config = LoraConfig(r=options.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.print_trainable_parameters()

    lines = [line for line in options.lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=options.lr)
    adapted.train()
    for step in range(options.steps):
        ids = tokenizer(lines[step % len(lines)], return_tensors="pt", truncation=True, max_length=256)["input_ids"]
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step}: loss {float(loss):.3f}")
    adapted.save_pretrained(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
