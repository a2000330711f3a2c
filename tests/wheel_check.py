"""Check an installed wheel outside the environment that built it: `python tests/wheel_check.py`.

Needs neither torch nor anything else: the library loads, runs its kernels' checks of arguments, and the files that must
be in the wheel are there. Where torch is installed, a layer is run too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
import sys


def main() -> None:
    found = importlib.util.find_spec("fastff")
    assert found is not None, "fastff is not installed"
    folders = [pathlib.Path(folder) for folder in found.submodule_search_locations or ()]
    package = next(folder for folder in folders if (folder / "__init__.py").is_file())
    assert "site-packages" in package.parts, f"{package} is not an installed wheel"
    library = ctypes.CDLL(str(next(package.glob("libfastff.*"))))
    library.fastff_isa.restype = ctypes.c_char_p
    isa = library.fastff_isa().decode()
    assert library.fastff_abi_version() >= 2
    assert (package / "py.typed").is_file()
    assert any((folder / "csrc" / "openvino" / "extension.cpp").is_file() for folder in folders)
    assert not list(package.glob("demo/data/*.xz")), "the demo's novels are not for the wheel"
    source = pathlib.Path(__file__).parents[1] / "src" / "fastff"
    every = [
        path.relative_to(source) for path in source.rglob("*") if path.suffix not in (".so", ".pyc") and path.is_file()
    ]
    missing = [str(path) for path in every if path.parts[:2] != ("demo", "data") and not (package / path).is_file()]
    assert not missing, f"the wheel lacks {', '.join(missing)}"
    print(f"library of ABI {library.fastff_abi_version()}, instruction set {isa}, without torch: as it should be")
    if importlib.util.find_spec("torch") is not None:
        run_a_layer()


def run_a_layer() -> None:
    """A layer computes the same with the kernels as with the reference."""
    import torch

    import fastff

    torch.manual_seed(0)
    layer = fastff.FFF(16, depth=3, trees=2).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    with fastff.ops.use_backend("reference"):
        want = layer(x)
    with fastff.ops.use_backend("native"):
        got = layer(x)
    assert (got - want).abs().max() < 1e-12
    print("a layer computes what its reference does")


if __name__ == "__main__":
    main()
    sys.exit(0)
