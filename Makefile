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

# The package as it is installed, convert/ in its place: the type checker follows no other way.
TYPED := $(VENV)/typed/mlx_redrafter

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf $(TYPED) && mkdir -p $(TYPED)
	@ln -s $(CURDIR)/mlx_redrafter/* $(CURDIR)/convert $(TYPED)
	@cd $(TYPED)/.. && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --package mlx_redrafter

exactness: $(STAMP)
	@$(BIN)/mlx-redrafter bench exactness

counts: $(STAMP)
	@$(BIN)/mlx-redrafter bench counts

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mlx-redrafter needs Python 3.11 or newer; $(PYTHON) is older. Run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into $(VENV) (once, a minute or two) ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
