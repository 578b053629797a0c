# Every target makes its own environment in .venv first; it is made again only when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo chat test test-slow lint exactness counts clean

demo: $(STAMP)
	@$(BIN)/mlx-redrafter demo

chat: $(STAMP)
	@$(BIN)/mlx-redrafter chat

# A file of tests stays in one process. What is marked slow has a target of its own.
PYTEST = $(BIN)/python -m pytest -q --numprocesses auto --dist loadfile

test: $(STAMP)
	@$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	@$(PYTEST) -m slow

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

exactness: $(STAMP)
	@$(BIN)/python -m mlx_redrafter.exactness

counts: $(STAMP)
	@$(BIN)/python -m mlx_redrafter.counts

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mlx-redrafter needs Python 3.10 or newer; $(PYTHON) is older. Run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into $(VENV) (once, a minute or two) ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
