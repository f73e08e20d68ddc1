# Habits of this repository. `make demo` and `make test` set up everything they need in .venv.
#
#   TORCH=torch==2.13.0   install this torch first (a CPU build, a given CUDA build ...); by default pip chooses
#                         (`make test-oldest` needs a CPU build: a CUDA build brings its own triton)
#   PYTHON=python3.12     the Python that makes the environment
#   OUT=demo              where `make demo` writes
#   STUDY=study           where `make study` writes (5 GB)

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
OUT ?= demo
STUDY ?= study
TOKENS ?= 3072

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := $(VENV)-oldest
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not gpu and not slow and not network and not browser and not cluster"

.PHONY: help demo demo-costs study families test test-oldest test-slow test-browser test-cluster test-gpu compile-ahead lint format types package clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "AnchorScope needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

$(OLDEST)/.installed: pyproject.toml tests/helpers/oldest.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(OLDEST)/bin/python -m pip install --quiet "$(TORCH)")
	$(OLDEST)/bin/python tests/helpers/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -e ".[hf,report,ray,test]" --constraint $(OLDEST)/constraints.txt
	@touch $@

demo-costs:
	@test -e $(STAMP) || echo "make demo: first the environment, $(VENV): 2.5 GB with a CPU build of torch (TORCH=), more with CUDA; minutes to download"
	@echo "make demo: then about 2 minutes of processor time; a model of 98 MB, downloaded once, and 210 MB in $(OUT)"

# Threads that wait for each other sleep instead of spinning: on a busy machine that is most of the processor time.
demo: export OMP_WAIT_POLICY := passive
demo: demo-costs $(STAMP)  ## capture a small real model, analyze and calibrate it, draw the pictures (into OUT=demo); bench it on a GPU
	@mkdir -p $(OUT)
	$(BIN)/anchorscope capture --model smollm2 --prompt samples/prompts/prose.txt --prompt samples/prompts/code.py.txt \
	  --prompt samples/prompts/needles.txt --tokens $(TOKENS) --layers 0,5,10,15,20,25 --dtype bf16 --out $(OUT)/dump --overwrite
	$(BIN)/anchorscope analyze $(OUT)/dump --block 64 --step 4 --theta 8,4,6,10,12 --out $(OUT)/analysis --overwrite
	$(BIN)/anchorscope calibrate $(OUT)/dump --groups 64x4,64x8 --target-recall 0.95 --out $(OUT)/calibration --overwrite
	$(BIN)/anchorscope report $(OUT)/analysis $(OUT)/calibration --dump $(OUT)/dump --html $(OUT)/report.html
	@if $(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then set -x; \
	  $(BIN)/anchorscope bench $(OUT)/dump --layers 5,20 --block 64 --step 4 --theta 8 --out $(OUT)/bench --overwrite; \
	  else echo "No CUDA GPU here, so nothing is timed: sparse attention is for GPUs (docs/benchmarks has an H100's figures)"; fi
	@echo
	@echo "Pictures: $(OUT)/analysis/figures/ and $(OUT)/calibration/figures/; everything on one page: $(OUT)/report.html"

study: $(STAMP)  ## calibrate and evaluate the small real model, and rewrite the tables of docs/study-smollm2.md (60 to 90 minutes)
	$(BIN)/python samples/study.py $(STUDY)

test: $(STAMP)  ## run the tests that need no GPU and no network
	$(TEST)

test-oldest: BIN := $(OLDEST)/bin
test-oldest: $(OLDEST)/.installed  ## run the same tests with the oldest packages that pyproject.toml admits
	$(TEST)

test-slow: $(STAMP)  ## run the long tests, which fetch the small real model
	$(BIN)/python -m pytest -m "(slow or network) and not gpu"

test-browser: $(STAMP)  ## run the tests of the HTML report in headless Chromium (chromium and chromedriver must be there)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

test-cluster: $(STAMP)  ## run the tests that start a Ray cluster of two nodes on this machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster

test-gpu: $(STAMP)  ## run the kernel tests on a CUDA GPU
	$(BIN)/python -m pytest -m gpu

families: $(STAMP)  ## run every model family and rewrite docs/families.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/family_runs.py docs/families.md

compile-ahead: $(STAMP)  ## compile the kernels for five GPU architectures, without a GPU; check shared memory and spills
	$(BIN)/python tests/benchmarks/compile_ahead.py

lint: $(STAMP)  ## style, formatting and types, as CI checks them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

package: $(STAMP)  ## build the wheel and the sdist and check them
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

clean:  ## remove the environment and what was built
	rm -rf $(VENV) $(OLDEST) dist build *.egg-info
