"""What holds the parts apart: imports point one way, heavy packages stay where they belong, no ISA leaks."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import cpp_source
import fastff

SOURCE = Path(__file__).parents[1] / "src" / "fastff"
RULES = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["tool"]["fastff"]
# A module may import from its own group of rooms and from those to its left.
ORDER = {room: index for index, group in enumerate(RULES["import-order"]) for room in group.split()}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 60  # of a file; of a function that is no kernel
ONLY_IN = {package: set(places.split()) for package, places in RULES["only-in"].items()}


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def imports(path):
    """Names of the modules a file imports, wherever in the file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def module_of(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path, modules):
    """Those of `modules` that a file imports, wherever in it but for the types of annotations."""
    nodes = [parsed(path)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)
        nodes += ast.iter_child_nodes(node)


def layer_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


CORE = sorted(path for end in ("h", "cpp") for path in (SOURCE.parents[1] / "csrc").rglob(f"*.{end}"))
FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    own = ORDER[layer_of(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "fastff" and len(parts) > 1:
            assert ORDER[parts[1]] <= own, f"{path.name} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    needs = {name: set(imported_modules(path, modules)) - {name} for name, path in modules.items()}
    while free := [name for name in needs if not needs[name] & needs.keys()]:
        for name in free:
            del needs[name]
    assert needs == {}, "each of these is in a circle, or imports one that is"


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_stay_where_they_belong(package):
    allowed = ONLY_IN[package]
    for path in FILES:
        if any(name.split(".")[0] == package for name in imports(path)):
            place = str(path.relative_to(SOURCE))
            assert any(place == a or place.startswith(f"{a}/") for a in allowed), f"{place} imports {package}"


def test_no_two_modules_have_one_name():
    homes = {}
    for path in FILES:
        homes.setdefault(path.parent.name if path.stem == "__init__" else path.stem, []).append(path)
    assert [paths for paths in homes.values() if len(paths) > 1] == []


def test_rooms_are_small():
    assert [str(path) for path in (*FILES, *CORE) if len(path.read_text().splitlines()) > MOST_LINES] == []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and not any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MOST_LINES_OF_A_FUNCTION, f"{path.name}: {node.name} has {lines} lines"


def test_functions_of_the_core_are_small():
    found = {path: list(cpp_source.functions(path.read_text())) for path in CORE}
    assert sum(map(len, found.values())) > 500, "the functions must be found"
    long = {
        (path.name, name): lines for path in CORE for name, _, lines in found[path] if lines > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


def test_functions_of_cpp_are_found_with_their_lines():
    source = """#define BRACE {
namespace fastff {
struct Router {
  Router() : at_{0} {}
  template <class T>
  int64_t kept(T x) const {  // not a brace: }
    auto twice = [&](int i) { return i + '}'; };
    if (x) { return twice(1); }
    return 0;
  }
  int at_;
};
constexpr int kSizes[] = {1, 2};
bool operator==(const Router& a, const Router& b) {
  return true;
}
}  // namespace fastff
extern "C" int32_t fastff_run(const char* text) { return text == "{"; }
"""
    names = [("Router", 4, 1), ("kept", 5, 6), ("operator==", 14, 3), ("fastff_run", 18, 1)]
    assert list(cpp_source.functions(source)) == names


def test_retired_names_stay_away():
    """Words that had a better one in this field. Files of earlier versions and their options are read by the shims."""
    root = SOURCE.parents[1]
    shims = {SOURCE / name for name in RULES["shims"].split()}
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("experiments/**/*.md")]
    scripts = [path for folder in ("benchmarks", "experiments", "tools") for path in (root / folder).rglob("*.py")]
    retired = re.compile(rf"(?i)(?<![a-z/-])({'|'.join(RULES['retired-names'].split())})(?![a-z])")
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in {*FILES, *CORE, *scripts, *pages} - shims - {root / "CHANGELOG.md"}
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if retired.search(line)
    ]
    assert found == []


def test_public_names():
    public = {"FFF", "BackendUnavailable", "CheckpointError", "FastffError", "ShapeError", "TreeConfig", "ops"}
    public |= {"load", "save", "ConditionalFeedforward", "FlatRouter", "ProductKeyRouter", "TreeRouter"}
    public |= {"export", "openvino_extension"}
    assert set(fastff.__all__) == public
    assert set(fastff.ops.__all__) >= {"forward", "conditional_matmul", "available_backends", "use_backend", "Routed"}
    for name in (*fastff.__all__, *(f"ops.{n}" for n in fastff.ops.__all__)):
        item = fastff
        for part in name.split("."):
            item = getattr(item, part)
        assert item.__doc__, f"{name} has no docstring"


def newest_source_of(built, folder):
    """When the last of the files changed that an object was compiled from, as the compiler listed them beside it (Ninja
    takes that list away: then of the whole core)."""
    listed, sources = Path(f"{built}.d"), CORE
    if listed.is_file():
        sources = [folder / name for name in listed.read_text().replace("\\\n", " ").split()[1:]]
    return max(path.stat().st_mtime if path.is_file() else float("inf") for path in sources)


def kernel_object(isa, folder):
    """The object file of an instruction set: of a build of these sources, else compiled here; None on other CPUs."""
    csrc = SOURCE.parents[1] / "csrc"
    for cache in (SOURCE.parents[1] / "build").glob("*/CMakeCache.txt"):
        built = cache.parent / "CMakeFiles" / "fastff_objects.dir" / "csrc" / "isa" / f"{isa}.cpp.o"
        sanitized = re.search(r"FASTFF_SANITIZE:\w+=.", cache.read_text())
        if built.is_file() and not sanitized and built.stat().st_mtime > newest_source_of(built, cache.parent):
            return built
    avx512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]
    dots = [*avx512, "-mavx512vnni", "-mavx512bf16"]
    flags = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": avx512, "avx512dot": dots}
    flags["amx"] = [*dots, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
    made, source = folder / "k.o", csrc / "isa" / f"{isa}.cpp"
    command = ["g++", "-std=c++17", "-O1", "-w", f"-I{csrc}", *flags[isa], "-c", str(source), "-o", str(made)]
    return None if subprocess.run(command, capture_output=True, check=False).returncode else made


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm")
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512dot", "amx"])
def test_no_symbol_of_a_newer_instruction_set_can_replace_a_baseline_one(isa, tmp_path):
    """A weak symbol (an inline function, a template of the library) in this file could be the one the linker keeps for
    the whole program, and crash an older CPU."""
    found = kernel_object(isa, tmp_path)
    if found is None:
        pytest.skip("this compiler does not target x86-64")
    symbols = subprocess.run(["nm", "-C", str(found)], capture_output=True, text=True, check=True).stdout
    kinds = {fields[2]: fields[1] for line in symbols.splitlines() if len(fields := line.split(maxsplit=2)) == 3}
    assert any("linear" in name for name in kinds), "the table of kernels must be there"
    own = {name: kind for name, kind in kinds.items() if not name.startswith("DW.ref.")}  # an address, no code
    assert [name for name, kind in own.items() if kind in "WVu"] == []
