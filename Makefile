# The words that people and CI type. Everything happens in a project-local virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

CMAKE ?= $(firstword $(wildcard $(BIN)/cmake) cmake)

.PHONY: demo test sanitize build-sanitize sanitize-threads test-c test-arm build-arm check format bench docs setup install-c wheel clean

demo: setup
	$(BIN)/fastff demo

# Two processes of one thread each: with more, each waits for the other's threads.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests of the C++ core against a build of it that stops at the first error of memory or undefined behaviour. Leaks of
# the interpreter would drown the core's, so they are not looked for here.
sanitize: setup build-sanitize
	FASTFF_LIBRARY=$(CURDIR)/build/sanitize/libfastff.so OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/python -m pytest -n 2 --dist loadfile -k "not (golden and reference-)" tests/test_native.py tests/test_golden.py tests/test_abi.py tests/test_core.py tests/test_conditional_native.py tests/test_router_native.py \
	tests/test_native_linear.py tests/test_engine_files.py tests/test_engine.py tests/test_encoder.py

build-sanitize:
	$(CMAKE) -S . -B build/sanitize -DFASTFF_SANITIZE=address,undefined
	$(CMAKE) --build build/sanitize --parallel $$(nproc)

# The core under ThreadSanitizer: many callers at once, and sixteen readers of packs that a writer replaces, from C and then
# from Python.
sanitize-threads: setup
	$(CMAKE) -S . -B build/sanitize-threads -DFASTFF_SANITIZE=thread
	$(CMAKE) --build build/sanitize-threads --parallel $$(nproc)
	$(CC) -std=c99 -fsanitize=thread -O1 -g -Icsrc tests/c/check_core.c build/sanitize-threads/libfastff.so \
	-Wl,-rpath,$(CURDIR)/build/sanitize-threads -lm -lpthread -o build/sanitize-threads/check_core
	for mode in threads snapshots "kernels 8"; do \
	TSAN_OPTIONS=halt_on_error=1 build/sanitize-threads/check_core $$mode || exit 1; done
	FASTFF_LIBRARY=$(CURDIR)/build/sanitize-threads/libfastff.so OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" \
	TSAN_OPTIONS="halt_on_error=1 suppressions=$(CURDIR)/tests/c/tsan.supp" \
	$(BIN)/python -m pytest -s -k sixteen_threads tests/test_packed.py tests/test_packed_conditional.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/fastff bench --out build/bench

# The documentation as a site in build/site; a broken link is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# For C programs: the header, shared and static library, and files for pkg-config and CMake. Needs neither Python nor torch.
PREFIX ?= /usr/local
install-c:
	$(CMAKE) -S . -B build/c -DFASTFF_C=ON -DCMAKE_INSTALL_PREFIX=$(PREFIX)
	$(CMAKE) --build build/c --parallel $$(nproc)
	DESTDIR=$(DESTDIR) $(CMAKE) --install build/c

# The example of examples/c, built from an installation of its own.
test-c: setup
	rm -rf build/c-root
	$(MAKE) install-c DESTDIR=$(CURDIR)/build/c-root
	FASTFF_C_ROOT=$(CURDIR)/build/c-root CMAKE=$(CMAKE) $(BIN)/python -m pytest tests/test_c_example.py

# The core for AArch64, cross-compiled with g++-aarch64-linux-gnu and run by qemu-user, against plain loops in C.
test-arm: build-arm
	aarch64-linux-gnu-gcc -std=c99 -O1 -static -Icsrc tests/c/check_core.c build/arm/libfastff.a \
	-lstdc++ -lm -lpthread -o build/arm/check_core
	qemu-aarch64 build/arm/check_core kernels
	qemu-aarch64 build/arm/check_core threads

build-arm:
	$(CMAKE) -S . -B build/arm -DFASTFF_C=ON -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
	$(CMAKE) --build build/arm --parallel $$(nproc)

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

setup: $(VENV)/.ready

# torch first and pinned, so that no other package's looser requirement chooses another build of it.
$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,bench,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo-report train-tiny-report
