# make demo   train the bundled digits dense and as an early ticket, print the bill, write the report
# make test   run the whole test suite
# make check  ruff and mypy
# make bench  a short version of every benchmark, some ten minutes on two cores; prints its page, kept below runs/
# make bench-full [HOURS=8]   all of them, three seeds; writes benchmarks/README.md, goes on where it was stopped
#
# Each works as the first command; everything lands in .venv, and a second run installs nothing.
#
#   PYTHON       the interpreter .venv is made from (3.11 to 3.13)
#   TORCH_INDEX  package index for PyTorch alone. On Linux the default wheel brings CUDA along; for a CPU-only machine:
#                make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
TORCH_INDEX ?=
TORCH := torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check bench bench-full clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/earlybird compare recipes/digits.toml --epochs 15 --seeds 1 --precision fp32 --out runs/demo
	$(BIN)/earlybird report runs/demo

# a process a core: one thread each is faster than two that wait for each other in networks as small as the tests'
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

HOURS ?= 8

bench: .venv/installed-bench
	$(BIN)/python benchmarks/run_all.py

bench-full: .venv/installed-bench
	$(BIN)/python benchmarks/run_all.py --full --hours $(HOURS)

clean:
	rm -rf .venv

# PyTorch goes first and without dependencies, so that nothing else chooses its build; the third line brings the rest.
# Some systems ship Python without ensurepip: there the outer pip fills the environment.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) install --quiet --no-deps -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet -c constraints.txt hatchling editables
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable .
	@touch $@

.venv/installed-bench: .venv/installed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[peers]'
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[dev,onnx,tensorboard,hf,lightning,graph,sweep]'
	@touch $@
