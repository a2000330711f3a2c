"""examples/c: a C program runs a layer that Python saved, and refuses every file that is none.

Links with the library beside the package; `make test-c` sets FASTFF_C_ROOT to an installation (DESTDIR), and then the
program is built from that alone, as a user would: with pkg-config, statically, and with CMake."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastff
from conftest import make_layer, make_rows
from fastff.ops.library import ABI_VERSION, find_library
from fuzzing import put

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "c"
SOURCES = [str(EXAMPLE / "run_layer.c"), str(EXAMPLE / "safetensors.c")]
INSTALLED = os.environ.get("FASTFF_C_ROOT")
FORMS = [
    {"depth": 6},
    {"depth": 0, "leaf_width": 3, "bias": True, "activation": "relu"},
    {"depth": 3, "trees": 2, "leaf_width": 2, "gate": "boundary", "tau": 0.3, "bias": True, "activation": "silu"},
    {"depth": 3, "gate": "boundary_min", "bias": True},
    {"depth": 2, "trees": 3, "leaf_width": 4, "node_output": False, "activation": "swiglu", "bias": True},
]
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
needs_installation = pytest.mark.skipif(INSTALLED is None, reason="runs under `make test-c` only")


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, **options)


def pkg_config(*options):
    root = Path(INSTALLED)
    found = next(root.rglob("fastff.pc")).parent
    environment = {**os.environ, "PKG_CONFIG_LIBDIR": str(found), "PKG_CONFIG_SYSROOT_DIR": str(root)}
    return run(["pkg-config", *options, "fastff"], env=environment).stdout.split()


def compile_example(to, *options, static=False):
    if INSTALLED:
        flags = pkg_config("--cflags", "--libs", *(["--static"] if static else []))
        folder = next(flag[2:] for flag in flags if flag.startswith("-L"))
        if static:
            flags = [f"{folder}/libfastff.a" if flag == "-lfastff" else flag for flag in flags]
    else:
        library = find_library()
        folder, flags = str(library.parent), [f"-I{ROOT / 'csrc'}", str(library)]
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-g"]
    rpath = [] if static else [f"-Wl,-rpath,{folder}"]
    done = run(["cc", *strict, *options, *SOURCES, *flags, *rpath, "-o", str(to)])
    assert done.returncode == 0, done.stderr
    return to


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_example(tmp_path_factory.mktemp("c") / "run_layer")


@pytest.fixture(scope="module")
def checked_program(tmp_path_factory):
    """Stops at the first error of memory or undefined behaviour in the example itself."""
    try:
        return compile_example(tmp_path_factory.mktemp("c") / "run_layer", "-fsanitize=address,undefined")
    except AssertionError as error:
        if "asan" not in str(error):
            raise
        pytest.skip("this compiler has no sanitizers")


def execute(program, *arguments, rows="", wrapper=(), **environment):
    environment = {
        "ASAN_OPTIONS": "exitcode=99:detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:exitcode=99",
        **environment,
    }
    command = [*wrapper, str(program), *map(str, arguments)]
    return run(command, input=rows, env={**os.environ, **environment})


def as_text(x):
    return "\n".join(" ".join(f"{value:.9g}" for value in row) for row in x.tolist())


def check_output(text, layer, x):
    """The program's lines, leaves and outputs, against Python's."""
    with torch.no_grad():
        want = layer.routed(x)
    trees = layer.config.trees
    lines = [line.split() for line in text.splitlines()]
    assert [[int(leaf) for leaf in line[:trees]] for line in lines] == want.leaf.tolist()
    got = torch.tensor([[float(value) for value in line[trees:]] for line in lines])
    torch.testing.assert_close(got, want.y.detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def saved(tmp_path):
    """A saved layer, its file, and rows."""
    layer = make_layer(7, 5, dtype=torch.float32, **FORMS[2])
    fastff.save(layer, tmp_path / "layer.safetensors")
    return layer, tmp_path / "layer.safetensors", make_rows(4, 7, dtype=torch.float32)


@pytest.mark.parametrize("quantization", [None, "bf16", "int8"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_it_computes_what_python_computes(options, quantization, program, tmp_path):
    layer, x = make_layer(33, 9, dtype=torch.float32, **options).eval(), make_rows(300, 33, dtype=torch.float32)
    layer.quantize(quantization)
    fastff.save(layer, tmp_path / "layer.safetensors")
    (tmp_path / "rows.txt").write_text(as_text(x))
    done = execute(program, tmp_path / "layer.safetensors", tmp_path / "rows.txt")
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, layer, x)


def test_it_reads_standard_input_and_any_number(saved, program):
    layer, path, x = saved
    x[1, 2], x[2, 0] = float("inf"), -0.0
    done = execute(program, path, rows=as_text(x[2:]))
    check_output(done.stdout, layer, x[2:])
    assert execute(program, path, rows="").stdout == ""
    assert execute(program, path, rows=as_text(x[:2])).returncode == 0


@pytest.mark.parametrize(
    ("rows", "text"),
    [("1 2 x3 4 5 6 7", "x3: is not a number"), ("1 2 3", "the last one is not complete"), ("9" * 100, "the last one")],
)
def test_it_names_rows_that_are_none(rows, text, saved, checked_program):
    done = execute(checked_program, saved[1], rows=rows)
    assert done.returncode == 1
    assert text in done.stderr


@pytest.mark.parametrize("digits", [62, 63, 64, 200, 1000])
def test_a_long_number_is_one_number(digits, saved, program):
    numbers = ["0." + "3" * digits] * 7
    whole = execute(program, saved[1], rows=" ".join(numbers))
    short = execute(program, saved[1], rows=" ".join(text[:12] for text in numbers))
    assert whole.returncode == 0, whole.stderr
    assert len(whole.stdout.splitlines()) == 1
    assert whole.stdout == short.stdout


def test_a_number_without_end_is_refused(saved, checked_program):
    done = execute(checked_program, saved[1], rows="0." + "3" * 1100)
    assert done.returncode == 1
    assert "more than 1023 characters" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_an_error(saved, program):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [program, saved[1]], input="0.5 " * 7, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "standard output: No space left on device" in done.stderr


def test_it_says_how_to_use_it_and_which_file_is_missing(saved, program):
    assert "usage: run_layer LAYER.safetensors [ROWS.txt]" in execute(program).stderr
    assert "nowhere: cannot be opened" in execute(program, "nowhere").stderr
    assert "nowhere: cannot be opened" in execute(program, saved[1], "nowhere").stderr


def write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def parts(path):
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def change(header, name, **fields):
    header[name] = {key: value for key, value in {**header[name], **fields}.items() if value is not None}


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda h: change(h, "w_in", dtype="Q4"), "tensor w_in has the dtype Q4, which is not known"),
        (lambda h: change(h, "w_in", dtype="F64"), "tensor w_in has 1288 bytes, its shape and dtype need 2576"),
        (lambda h: change(h, "w_in", dtype="I32"), "w_in: is I32, this program reads F32"),
        (lambda h: change(h, "w_in", shape=[23, 2, 7]), "w_in: is not of shape (2, 23, 7)"),
        (lambda h: change(h, "w_in", shape=[2, 161]), "w_in: is not of shape (2, 23, 7)"),
        (lambda h: change(h, "b_in", shape=[46]), "b_in: is not of shape (2, 23)"),
        (lambda h: change(h, "w_in", shape=[2**40, 2**40, 2**40]), "tensor w_in is larger than can be addressed"),
        (lambda h: change(h, "w_in", shape=[1] * 9), "expected fewer numbers"),
        (lambda h: change(h, "w_in", shape=[2**63]), "expected a smaller number"),
        (lambda h: change(h, "w_in", shape=[-2, 23, 7]), "expected a natural number"),
        (lambda h: change(h, "w_in", data_offsets=[2**40, 2**40 + 1288]), "tensor w_in lies at bytes 1099511627776 to"),
        (lambda h: change(h, "w_in", data_offsets=[1316, 0]), "tensor w_in lies at bytes 1316 to 0"),
        (lambda h: change(h, "w_in", data_offsets=[2, 1290]), "tensor w_in is not aligned to its elements"),
        (lambda h: change(h, "w_in", data_offsets=[0]), "tensor w_in lacks its dtype, shape or two data_offsets"),
        (lambda h: change(h, "w_in", dtype=None), "tensor w_in lacks its dtype"),
        (lambda h: change(h, "w_in", colour="red"), "tensor w_in has an unknown field colour"),
        (lambda h: change(h, "w_in", **{"\x1b[31m": 1}), "tensor w_in has an unknown field ?[31m"),
        (lambda h: h.pop("w_out"), "w_out: missing"),
        (lambda h: h.pop("__metadata__"), "format: is not fastff"),
        (lambda h: change(h, "__metadata__", format="pt"), "format: is not fastff"),
        (lambda h: change(h, "__metadata__", version="2"), "version: has an impossible value"),
        (lambda h: change(h, "__metadata__", depth=None), "depth: missing in the metadata"),
        (lambda h: change(h, "__metadata__", depth="25"), "depth: has an impossible value"),
        (lambda h: change(h, "__metadata__", depth="3 "), "depth: has an impossible value"),
        (lambda h: change(h, "__metadata__", trees="9" * 30), "trees: has an impossible value"),
        (lambda h: change(h, "__metadata__", activation="tanh"), "activation: has an unknown value"),
        (lambda h: change(h, "__metadata__", quantization="int4"), "quantization: has an unknown value"),
        (lambda h: change(h, "__metadata__", tau="-1"), "tau must be positive and finite"),
        (lambda h: change(h, "__metadata__", tau="?"), "tau: is not a number"),
        (lambda h: change(h, "__metadata__", depth=3), "expected '\"'"),
        (lambda h: h.update({str(i): {} for i in range(3)}), "expected '\"'"),
    ],
)
def test_it_names_what_is_wrong_with_a_file(edit, text, saved, checked_program):
    path = saved[1]
    header, data = parts(path)
    edit(header)
    write(path, header, data)
    done = execute(checked_program, path)
    assert done.returncode == 1, done.stderr
    assert text in done.stderr


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"1234567", "has 7 bytes, a header's length alone has 8"),
        (b"\xff" * 40, "says that it has 18446744073709551615 bytes, the file has 32 after it"),
        (b"\x02" + bytes(7) + b"{", "says that it has 2 bytes, the file has 1 after it"),
        (b"\x02" + bytes(7) + b"[]", "expected '{' at byte 0"),
        (b"\x04" + bytes(7) + b"{} x", "expected the end at byte 3"),
        (b"\x05" + bytes(7) + b'{"a\\u', "expected an ASCII escape"),
        (b"\x0d" + bytes(7) + b'{"a\\u12"3":1}', "expected an ASCII escape"),
        (b"\x04" + bytes(7) + b'{"a\\', "expected an escape"),
        (b"\x06" + bytes(7) + b'{"a\x00":', "expected no control character"),
        (b"\x03" + bytes(7) + b'{"a', "expected '\"'"),
    ],
)
def test_it_refuses_a_file_of_another_kind(content, text, tmp_path, checked_program):
    (tmp_path / "layer").write_bytes(content)
    done = execute(checked_program, tmp_path / "layer")
    assert done.returncode == 1, done.stderr
    assert text in done.stderr


def test_a_name_that_stands_twice_is_refused(saved, checked_program):
    header, data = parts(saved[1])
    text = json.dumps(header)
    write(saved[1], f'{text[:-1]}, "w_in": {json.dumps(header["w_in"])}}}'.encode(), data)
    assert "tensor w_in is there twice" in execute(checked_program, saved[1]).stderr


def test_more_entries_than_it_takes_are_refused(tmp_path, checked_program):
    tensor = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    write(tmp_path / "layer", {f"t{i}": tensor for i in range(2049)}, b"")
    assert "more than 2048 entries" in execute(checked_program, tmp_path / "layer").stderr


def test_it_reads_escapes_and_other_tensors(saved, checked_program):
    layer, path, x = saved
    tensors = {**load_file(path), 'a "quoted"\n\\name': torch.zeros(3, dtype=torch.float64)}
    save_file(tensors, path, parts(path)[0]["__metadata__"])
    done = execute(checked_program, path, rows=as_text(x))
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, layer, x)


def test_no_damaged_file_disturbs_it(saved, checked_program):
    """Bytes of the header changed, cut, doubled: an answer or a message, never a fault."""
    generator, path = random.Random(0), saved[1]
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            at = generator.choice([generator.randrange(8, end), generator.randrange(8)])
            match generator.randrange(4):
                case 0:
                    damaged[at] = generator.choice(b'"{}[]:,\\0919-ue \x00\xff')
                case 1:
                    del damaged[at : at + generator.randint(1, 20)]
                case 2:
                    damaged[at:at] = damaged[at : at + generator.randint(1, 20)]
                case _:
                    damaged[at] ^= 1 << generator.randrange(8)
        put(path, damaged)
        done = execute(checked_program, path, rows="1 2 3 4 5 6 7")
        assert done.returncode in (0, 1), done.stderr
        assert bool(done.stderr) == (done.returncode == 1)
        refused += done.returncode
    assert refused > 60, "the damage must reach what is checked"


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_valgrind_finds_neither_errors_nor_leaks(saved, program, tmp_path):
    layer, path, x = saved
    wrapper = [
        "valgrind",
        "--quiet",
        "--error-exitcode=99",
        "--leak-check=full",
        "--show-leak-kinds=definite,indirect,possible",
    ]
    done = execute(program, path, rows=as_text(x), wrapper=wrapper, FASTFF_ISA="avx2" if "avx2" in isas() else "scalar")
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, layer, x)
    header, data = parts(path)
    change(header, "w_out", data_offsets=[0, 4])
    write(path, header, data)
    done = execute(program, path, wrapper=wrapper, FASTFF_ISA="scalar")
    assert done.returncode == 1, done.stderr
    assert "w_out has 4 bytes" in done.stderr


def isas():
    from conftest import supported_isas

    return supported_isas()


@needs_installation
def test_the_installed_library_has_the_abi_version_in_its_name(program):
    libraries = {path.name for path in Path(INSTALLED).rglob("libfastff*")}
    version = f"{ABI_VERSION}.{fastff.__version__}"
    assert libraries == {
        "libfastff.a",
        "libfastff.so",
        f"libfastff.so.{ABI_VERSION}",
        f"libfastff.so.{version}",
    }
    needed = run(["readelf", "-d", str(program)]).stdout
    assert f"Shared library: [libfastff.so.{ABI_VERSION}]" in needed
    assert pkg_config("--modversion") == [fastff.__version__]


@needs_installation
def test_it_links_statically(saved, tmp_path):
    layer, path, x = saved
    done = execute(compile_example(tmp_path / "static", static=True), path, rows=as_text(x))
    check_output(done.stdout, layer, x)
    assert "libfastff" not in run(["readelf", "-d", str(tmp_path / "static")]).stdout


@needs_installation
@pytest.mark.parametrize("target", ["fastff::fastff", "fastff::fastff_static"])
def test_it_builds_with_cmake(target, saved, tmp_path):
    layer, path, x = saved
    project = tmp_path / "project"
    shutil.copytree(EXAMPLE, project)
    lists = project / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("fastff::fastff)", f"{target})"))
    package = next(Path(INSTALLED).rglob("fastffConfig.cmake")).parent
    for command in (
        ["-S", str(project), "-B", str(tmp_path / "build"), f"-Dfastff_DIR={package}"],
        ["--build", str(tmp_path / "build")],
    ):
        done = run([os.environ.get("CMAKE", "cmake"), *command])
        assert done.returncode == 0, done.stdout + done.stderr
    check_output(execute(tmp_path / "build" / "run_layer", path, rows=as_text(x)).stdout, layer, x)
