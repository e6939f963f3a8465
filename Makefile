# Everything here starts from Python 3.11 or newer, pip and make: each target sets up what it needs.
#   make demo    the main job, end to end; the report lands under ./runs
#   make test    formatting, lint, types and tests
#   make quick   under a minute: formatting, lint, and tests of every room that take seconds
#   make coverage  the tests, with the lines and branches of kolmo/ that none of them reaches
#   make docs    the documentation, in docs/_build/html
#   make lowest  the tests with the lowest versions that pyproject.toml admits, in an environment of their own
# Overridable: PYTHON (the interpreter that makes the environment), VENV, PIP_FLAGS, JOBS (test processes).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_FLAGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt $(PIP_FLAGS)
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs

.DELETE_ON_ERROR:
.PHONY: demo test quick coverage format lint types pytest docs lowest clean

demo: $(INSTALLED)
	$(BIN)/kolmo demo $(DEMO_FLAGS)

test: lint types pytest

# torch goes first and alone, pinned: where a CPU build is on hand pip takes it, and the step that is
# long by far is seen for what it is.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kolmo needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[test]'
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) --editable '.[test,docs]'
	touch $@

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# One thread a process: the test processes, not the linear algebra inside them, share the cores.
pytest: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --quiet

# For the loop of work: the order of the rooms, and of each room what breaks first.
QUICK := tests/test_architecture.py tests/test_errors.py tests/test_kernels.py tests/test_faces.py \
  tests/test_terminal.py tests/test_estimate.py tests/control/test_sets.py \
  tests/bridge/test_resnet.py tests/test_landscape_planes.py tests/test_report.py

quick: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 \
	  $(BIN)/python -m pytest --numprocesses $(JOBS) --quiet --exitfirst $(QUICK)

# Compiled kernels run outside Python, where no line of theirs is seen: see [tool.coverage.run].
coverage: $(INSTALLED)
	$(PIP) pytest-cov
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 \
	  $(BIN)/python -m pytest --numprocesses $(JOBS) --quiet --cov --cov-report=term-missing:skip-covered --cov-report=xml

# Every >= of what a user or a test installs, as ==: what is promised is what is installed and tested.
LOWEST := .venv-lowest
$(LOWEST)/versions.txt: pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) -c 'import re, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  o = p["optional-dependencies"]; names = [n for n in o if n not in ("benchmarks", "docs", "dev", "lightning")]; \
	  lines = p["dependencies"] + sum((o[n] for n in names), []); \
	  found = (re.fullmatch(r"([\w-]+)(\[\w+\])?>=([\d.]+)", line) for line in lines); \
	  print("\n".join(f"{m[1]}=={m[3]}" for m in found if m and m[1] not in ("mypy", "ruff")))' > $@

lowest: $(LOWEST)/versions.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint $< $(PIP_FLAGS) torch
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint $< $(PIP_FLAGS) -e '.[test]'
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(JOBS) --quiet

docs: $(DOCS_INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

clean:
	rm -rf docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* coverage.xml
	find kolmo experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
