# make demo   install what is missing, fetch the embedded model once, take the guided tour
# make test   installs too, then runs the tests;   make lint   ruff;   make benchmark   this machine's speed
# make test-servers   --endpoint against llama.cpp's own server, two of them, one of which is killed (minutes)
# make test-vllm   the same against vLLM, on a processor with AVX-512: installs its CPU build once (minutes)
# make test-ray   scripts/score_on_ray.py: two actors, two simulated nodes, kills (minutes)
# make test-study   makes the README's numbers, outputs and figures again and compares (minutes)
# make test-browser   the interactive report in headless Chromium (apt-get install chromium)
# make test-stops   kills and interrupts every scoring script, again and again (minutes)
# make test-sagemaker   trains end to end on a stand-in for AWS, on this machine (minutes)
PYTHON ?= python3
BIN := .venv/bin
# One thread a process: two processes of one thread are faster than one of two.
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: demo test test-servers test-vllm test-ray test-study test-browser test-sagemaker test-stops lint benchmark clean

demo: .venv/installed
	$(BIN)/python main.py

test: .venv/installed-tests
	$(PARALLEL) --dist loadfile

test-servers: .venv/installed-servers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m servers tests/test_servers.py tests/test_packed.py

test-vllm: .venv/installed-tests
	$(BIN)/python tests/install_vllm.py .venv-vllm
	$(BIN)/python -m pytest -m vllm tests/test_vllm.py

test-ray: .venv/installed-tests .venv/installed-ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/test_ray.py

test-study: .venv/installed-tests
	$(PARALLEL) -m study
	$(BIN)/python scripts/make_figures.py --check
	$(BIN)/python scripts/record_predictions.py --check

test-browser: .venv/installed-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

test-sagemaker: .venv/installed-tests
	$(PARALLEL) -m sagemaker

test-stops: .venv/installed-tests
	$(PARALLEL) -m stops

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: .venv/installed
	$(BIN)/python scripts/benchmark.py

clean:
	rm -rf .venv .venv-vllm

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

.venv/installed-ray: .venv/installed requirements-ray.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-ray.txt
	@touch $@

.venv/installed-servers: .venv/installed-tests tests/requirements-servers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements-servers.txt
	@touch $@
