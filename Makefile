# `make quickstart` and `make test` need nothing but Python 3.11 or newer: the environment is created on first use.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: quickstart pretrain test test-full lint size bench
test test-full bench: export OMP_NUM_THREADS = 1

quickstart: $(INSTALLED)
	$(PY) scripts/quickstart.py

pretrain: $(INSTALLED)
	$(PY) scripts/pretrain_demo.py

# Layouts keep ranks from test to test and go one test at a time; the rest in two processes. Fails if either part does, after both.
RANKS := tests/dist tests/gpu
test: $(INSTALLED)
	$(PY) -m pytest -m "not full" $(RANKS); ranks=$$?; \
	$(PY) -m pytest -m "not full" -n 2 --dist loadfile $(addprefix --ignore=,$(RANKS)) && exit $$ranks

test-full: $(INSTALLED)
	$(PY) -m pytest

lint: $(INSTALLED) size
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

size: $(INSTALLED)
	$(PY) scripts/size.py

bench: $(INSTALLED)
	$(PY) benchmarks/throughput.py

# torch first and on its own: it is most of the download, and the constraint keeps it at the tested version.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "torchft needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@echo "Installing torchft and its dependencies into $(VENV) (once, about a minute)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
