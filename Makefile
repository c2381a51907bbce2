# Two commands do everything a newcomer needs: `make serve` and `make check`.
# PYTHON chooses the interpreter (3.11 or newer); what is installed goes into .venv and nowhere else.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve check lint test clean

serve: .venv/serve.done  ## Install Brigade and serve the demo model on http://127.0.0.1:8000
	$(BIN)/brigade serve $(MODEL)

check: lint test  ## Install what the tests need and run everything that CI runs

lint: .venv/check.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: .venv/check.done
	$(BIN)/python -m pytest

clean:
	rm -rf .venv

.venv/python.done:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Brigade needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/serve.done: .venv/python.done pyproject.toml
	@echo "installing Brigade into .venv (torch is large: this can take minutes)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/check.done: .venv/python.done pyproject.toml
	@echo "installing Brigade and what its tests need into .venv (torch is large: this can take minutes)"
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/serve.done
