"""A model with conditional layers in a program of OpenVINO's, which needs neither fastff nor PyTorch.

fastff export converted --to openvino --out ir
pip install openvino tokenizers
python examples/openvino_runtime.py ir "A sentence."
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import openvino as ov
from tokenizers import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ir", type=Path, help="directory that fastff export --to openvino wrote")
    parser.add_argument("text")
    options = parser.parse_args()

    core = ov.Core()
    core.add_extension(options.ir / "libfastff_openvino.so")  # the operations of conditional layers
    model = core.compile_model(options.ir / "openvino_model.xml", "CPU")
    found = Tokenizer.from_file(str(options.ir / "tokenizer.json")).encode(options.text)
    every = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
    names = [port.any_name for port in model.inputs]
    output = model({name: np.array([every[name]], np.int64) for name in names})[0]
    print(f"{len(found.ids)} tokens, output {output.shape}: {np.round(output.ravel()[:4], 4).tolist()} ...")


if __name__ == "__main__":
    main()
