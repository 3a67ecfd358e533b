# make demo   install what is missing, fetch the embedded model once, take the guided tour
# make test   the same, then the tests;   make lint   ruff;   make benchmark   this machine's speed
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint benchmark clean

demo: .venv/installed
	$(BIN)/python main.py

test: .venv/installed-tests
	$(BIN)/python -m pytest

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: .venv/installed
	$(BIN)/python scripts/benchmark.py

clean:
	rm -rf .venv

# The stamps are written last, so an interrupted set-up is taken up again and a finished one is never repeated.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@
