# make demo   segments a photo with the bundled weights and reports the speed
# make test   all tests that this machine can run
# make bench  a few networks compared with their peers, in minutes; prints the results and writes them to build/bench
# make bench-cpu  all networks on a CPU; writes benchmarks/results, the README's table and docs/cpu.md
# make bench-ops  ops compared with their peers, on a few of the networks' shapes, and the README's table; ARGS='-m ""' runs all shapes
# make bench-training  training steps compared with torch's; writes benchmarks/results, docs/training_speed.md and README
# make lint   ruff, mypy, clang-format
#
# Each target installs its dependencies into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Pinned, so that every machine runs the same; the package itself takes any torch from 2.10.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
LINTERS ?= ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test bench bench-cpu bench-ops bench-training lint format clean

demo: .venv/.demo
	$(BIN)/python demo/run.py $(IMAGE)

# A process a core, eight at most: each takes up to 3 GB. ARGS='-n 0' runs all in one. The tests that build
# wheels find cmake and ninja on the path.
test: .venv/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

bench: .venv/.bench
	$(BIN)/python benchmarks/models.py --quick --case-seconds 3 --out build/bench/models_cpu.jsonl $(ARGS)

bench-cpu: .venv/.bench
	$(BIN)/python benchmarks/models.py --breakdown --memory $(ARGS)
	$(BIN)/python benchmarks/table.py
	$(BIN)/python benchmarks/plot.py

bench-ops: .venv/.bench
	$(BIN)/python -m pytest benchmarks/ops -m quick --benchmark-quiet $(ARGS)
	$(BIN)/python benchmarks/ops/plot.py benchmarks/results/ops_*.jsonl
	$(BIN)/python benchmarks/ops/page.py

bench-training: .venv/.bench
	$(BIN)/python benchmarks/training.py --memory $(ARGS)
	$(BIN)/python benchmarks/training_page.py

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: .venv/.lint
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "PYTHON is $(PYTHON), Python %d.%d, it must be 3.10 or newer" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(PIP) install -q --upgrade 'pip>=24'
	$(PIP) install -q $(TORCH) numpy
	touch $@

.venv/.installed: .venv/.torch $(SOURCES)
	$(PIP) install -q -e .
	touch $@

# Only for a photograph that it brings; none of its code runs, so its dependencies stay away.
.venv/.demo: .venv/.installed
	$(PIP) install -q --no-deps scikit-learn
	touch $@

# With the emulator, on which the CUDA kernels are tested.
.venv/.test: .venv/.torch $(SOURCES)
	$(PIP) install -q $(TRITON)
	SHELFKERN_EMULATION=1 $(PIP) install -q -e '.[test]'
	touch .venv/.installed $@

.venv/.bench: .venv/.installed
	$(PIP) install -q -e '.[bench]'
	touch $@

# Linters read sources: nothing is compiled, and what is compiled already stays.
.venv/.lint: .venv/.torch pyproject.toml
	SHELFKERN_NATIVE=0 $(PIP) install -q -e . $(LINTERS)
	touch $@

clean:
	rm -rf .venv build dist *.egg-info shelfkern/_native*.so shelfkern/_emulation*.so shelfkern_out
