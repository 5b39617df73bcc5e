# For a fresh machine: `make demo`, `make chat` and `make test`; `make test-fast` for daily
# work.
PYTHON ?= python3
VENV ?= .venv
# Test processes. Compiling keeps one core busy, so two halve the time on two. They begin
# three times, as the programs that they compile stay in memory, and as a process has all
# of them as users do or none.
JOBS ?= 2
PYTEST := $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# As typed, so that a prompt may hold quotes and dollar signs.
export TEXT := $(value PROMPT)
CHAT_MODEL := smollm2-135m-instruct

.PHONY: demo chat test test-fast lint clean

$(VENV)/.run: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("treespec-jax needs Python 3.11 or newer, this is %d.%d; set PYTHON=" % v)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.run
	@$(VENV)/bin/python scripts/generate.py --prompt="$${TEXT:-once upon a time}" \
		--tree=dynamic:7@4 --compare

chat: $(VENV)/.run
	@$(VENV)/bin/python scripts/fetch_model.py $(CHAT_MODEL) > /dev/null
	@$(VENV)/bin/python scripts/generate.py --chat --target=$(CHAT_MODEL) \
		--max_tokens=512 $${TEXT:+--prompt="$$TEXT"}

test: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTEST) -m optimised
	$(PYTEST) -m "not optimised" tests/engine
	$(PYTEST) -m "not optimised" --ignore=tests/engine

# Without the tests marked slow.
test-fast: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(PYTEST) -m "optimised and not slow"
	$(PYTEST) -m "not optimised and not slow"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) runs
