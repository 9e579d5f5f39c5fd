# `make test`, `make quality` and `make demo` set up what they need in .venv on a fresh machine.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Where there is no NVIDIA GPU, this release is enough; point pip at PyTorch's CPU index to get its small build.
TORCH ?= $(shell nvidia-smi >/dev/null 2>&1 && echo "torch>=2.13" || echo "torch==2.13.0")
# Further arguments of the demo, e.g. DEMO_ARGS="--num_rounds 2".
DEMO_ARGS ?=
TEST_ARGS ?=
BENCHMARK_ARGS ?= --output runs/benchmark.json --plot runs/benchmark.png

# The lowest versions that setup.py allows, each as name==version.
LOWEST := $(shell sed -n 's/^ *"\([a-z_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.py | sort -u)

.PHONY: install test test-slow test-lowest test-other-cpu quality format demo benchmark clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# The test models are tiny: two processes of one thread each are faster than one of two.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST_ARGS)

# What must always hold, computed as an older CPU does it: without AVX, and sums in another order.
test-other-cpu: install
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 \
		tests/test_invariants.py tests/test_base_layers.py tests/test_faults.py $(TEST_ARGS)

# The same tests with the lowest versions, in an environment of their own.
test-lowest: $(VENV)-lowest/.installed
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n 2 $(TEST_ARGS)

$(VENV)-lowest/.installed: setup.py
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet $(LOWEST)
	$(VENV)-lowest/bin/python -m pip install --quiet --editable .
	touch $@

# The same claims on SmolLM2-135M in 4 bit. Takes minutes.
test-slow: install
	$(BIN)/python -m pytest -m slow $(TEST_ARGS)

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: install
	$(BIN)/accelerate launch recipes/gsm8k.py --config recipes/configs/demo.yaml $(DEMO_ARGS)

benchmark: install
	$(BIN)/python recipes/benchmark.py $(BENCHMARK_ARGS)

clean:
	rm -rf $(VENV) $(VENV)-lowest runs *.egg-info
