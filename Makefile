# `make quickstart` and `make test` need nothing but Python >= 3.11: they make .venv themselves.
VENV ?= .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed
QUICKSTART := $(VENV)/bin/scmdm study configs/qm9/quickstart.yaml $(if $(FROM_SCRATCH),from_scratch=true out=quickstart-from-scratch) $(ARGS)

# An interpreter that has the packages already, as on a GPU machine that is lent by the minute; else .venv.
GPU_PYTHON ?= $(VENV)/bin/python

.PHONY: install quickstart demo test test-all test-oldest lint format docs bench gpu

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

# FROM_SCRATCH=1 trains the base first (about an hour more); ARGS='key=value ...' changes the study.
quickstart: $(STAMP)
	$(QUICKSTART)

# The page at http://localhost:7860 shows one sample of a base and of its adaptation, step by step.
demo: $(STAMP)
	$(VENV)/bin/scmdm demo configs/qm9/long-scmdm --base configs/qm9/long-base

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" -n 2 --dist worksteal

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

# The quick tests with the oldest versions that pyproject.toml allows, instead of those of constraints.txt.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -m "not slow" -n 2 --dist worksteal

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The site is in build/site; a warning, such as a broken link, is an error.
docs: $(STAMP)
	$(VENV)/bin/python -m mkdocs build --strict

bench: $(STAMP)
	$(VENV)/bin/python -m benchmarks

# Everything worth knowing of one GPU, in at most eight minutes, into docs/lab/gpu. DEVICE=cpu rehearses with tiny shapes.
gpu: $(if $(filter $(VENV)/bin/python,$(GPU_PYTHON)),$(STAMP))
	$(GPU_PYTHON) -m benchmarks gpu $(if $(DEVICE),--device $(DEVICE)) $(if $(filter cpu,$(DEVICE)),--tiny) $(ARGS)
