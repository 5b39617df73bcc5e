# Two commands for a fresh machine: `make demo` and `make test`; `make test-fast` for
# daily work.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= once upon a time
# Test processes. Compiling keeps one core busy, so two halve the time on two.
JOBS ?= 2

.PHONY: demo test test-fast lint clean

$(VENV)/.run: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("treespec-jax needs Python 3.11 or newer, this is %d.%d; set PYTHON=" % v)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.run
	@$(VENV)/bin/python scripts/generate.py --prompt="$(PROMPT)"

test: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

# Without the tests marked slow.
test-fast: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) runs
