# Two commands do everything on a fresh machine: `make run` (the main job) and `make test` (the suite).
PYTHON ?= python3
VENV ?= .venv
# A plain `torch` would bring gigabytes of CUDA; this version also exists as a CPU build.
TORCH ?= torch==2.13.0
FUZZ ?= 1000000
SEEDS ?= 0,1,2
PAIRS ?= 100
EXPERIMENT := runs/experiments/curriculum
POLICIES := runs/experiments/hybrid-rl
NO_MORE := sources.flags=0 sources.photos=0 sources.held_out_digits=540
PRODUCED := sources.easy_vqa=800 sources.scenes=200 sources.digits=340 sources.sheets=60 $(NO_MORE)
HELD_OUT := sources.easy_vqa=300 sources.scenes=75 sources.digits=150 sources.sheets=20 $(NO_MORE) \
  sources.skip.easy_vqa=800 sources.skip.scenes=200 sources.skip.digits=400 sources.skip.sheets=60
# Processes of the test suite.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TRANSFORMERS ?= 5.14 5.17 5.23
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.DEFAULT_GOAL := help
RESULTS ?= bench/results
MINUTES ?= 8
# Installs with the Python that is there, from nothing but this checkout, into a folder; then runs the stages from it.
define gpu_suite
	$(1) bench/gpu/install.py build/$(2)/site build/$(2)/build.json
	PYTHONPATH=$(CURDIR)/build/$(2)/site $(1) -m m4ov_bench.gpu --work build/$(2)/work --build build/$(2)/build.json $(3)
endef

.PHONY: help run experiments bench overhead test lint types pytest kernels sanitize fuzz parity fuzz-parity smoke gpu gpu-dry test-transformers test-trl test-formats clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

run: $(VENV)/.quickstart ## train, evaluate and compare a tiny Qwen3-VL on real images; writes runs/quickstart/
	$(BIN)/m4ov run quickstart

# Questions on the same images allotted by density, evenly (no fewer), and all that can be asked on others, to judge by.
experiments: $(VENV)/.quickstart ## the curriculum against other arms, objectives of reinforcement learning against each other, with SEEDS=0,1,2
	$(BIN)/m4ov data build data run.folder=$(EXPERIMENT)/allotted $(PRODUCED) allot.questions=4000
	$(BIN)/m4ov data build data run.folder=$(EXPERIMENT)/uniform $(PRODUCED) allot.questions=4020 allot.by=uniform
	$(BIN)/m4ov data build data run.folder=$(EXPERIMENT)/produced $(HELD_OUT) allot.questions=60000 allot.by=uniform
	$(BIN)/m4ov run curriculum run.folder=$(EXPERIMENT) "seeds=[$(SEEDS)]" pools.allotted=$(EXPERIMENT)/allotted/records \
	  pools.uniform=$(EXPERIMENT)/uniform/records skills.produced=$(EXPERIMENT)/produced/records
	$(BIN)/m4ov run hybrid-rl run.folder=$(POLICIES) "seeds=[$(SEEDS)]"
	mkdir -p experiments && cp $(EXPERIMENT)/results.json experiments/curriculum.json
	cp $(POLICIES)/results.json experiments/hybrid-rl.json

bench: $(VENV)/.dev $(VENV)/.peers ## operators against the machine's limit and against their peers
	$(BIN)/m4ov bench --json runs/bench/bench.json --plot runs/bench/bench.png

overhead: $(VENV)/.dev ## what the training loop costs over a bare step of the quickstart, by turns
	$(BIN)/python -m tests.train.overhead

test: lint types pytest kernels sanitize smoke gpu-dry ## the whole suite

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# CI has the compilers that the lock was made with, and must compare; elsewhere a version without a lock is said.
kernels: $(VENV)/.dev ## compile every GPU kernel for every target, without a GPU; budgets and the lock
	$(BIN)/m4ov kernels check $(if $(CI),--exact)

sanitize: $(VENV)/.dev ## the native tests under AddressSanitizer and UBSan
	$(BIN)/python tests/sanitize.py

fuzz: $(VENV)/.dev ## FUZZ=1000000 random calls of every operator under the sanitizers, on every instruction set
	$(BIN)/python tests/fuzz.py --calls $(FUZZ)

parity: $(VENV)/.dev ## every parallel layout against one process; and the collectives that are written down
	$(BIN)/m4ov parity

fuzz-parity: $(VENV)/.dev ## PAIRS=100 random layouts and batches against one process, in float64
	$(BIN)/m4ov parity --fuzz $(PAIRS)

smoke: $(VENV)/.dev ## a one-minute quickstart
	rm -rf runs/smoke
	$(BIN)/m4ov run quickstart run.folder=runs/smoke scale=0.05 evaluate.limit=256 compare.steps=4 operators=false \
	  production.sources.easy_vqa=600 production.sources.digits=300 production.allot.questions=5000

gpu: ## on a CUDA machine, without a network: build, check, measure; writes RESULTS (bench/results)
	$(call gpu_suite,$(PYTHON),gpu,--results $(RESULTS) --minutes $(MINUTES) $(if $(COMMIT),--commit $(COMMIT)))

gpu-dry: $(VENV)/.dev ## the same script on the CPU, interpreted, tiny shapes: proves the script, measures nothing
	$(call gpu_suite,$(BIN)/python,gpu-dry,--results runs/gpu-dry --minutes 15 --dry-run)

test-transformers: ## patches and our own model on every supported transformers, each in its own environment
	for version in $(TRANSFORMERS); do \
	  $(MAKE) --no-print-directory $(VENV)-transformers-$$version/.ready || exit 1; \
	  $(VENV)-transformers-$$version/bin/python -m pytest tests/kernels/test_patches*.py tests/models || exit 1; \
	done

$(VENV)-transformers-%/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)-transformers-$*
	$(VENV)-transformers-$*/bin/pip install -q $(TORCH)
	$(VENV)-transformers-$*/bin/pip install -q "transformers==$*.*" -e ".[train]" peft pytest hypothesis
	touch $@

test-trl: $(VENV)-trl/.ready ## the operators in the trainers of TRL, the newest, in its own environment
	$(VENV)-trl/bin/python -m pytest tests/kernels/test_trl.py tests/kernels/test_readme.py

$(VENV)-trl/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/pip install -q $(TORCH)
	$(VENV)-trl/bin/pip install -q -e ".[trl]" hypothesis matplotlib peft pytest
	touch $@

test-formats: $(VENV)-formats/.ready ## readers and writers of quantised weights against all the owners' libraries
	M4OV_FORMATS=1 $(VENV)-formats/bin/python -m pytest tests/kernels/test_gemm_formats*.py

# AutoAWQ and GPTQModel without what they ask for: GPTQModel wants a newer torch than ours, and with it CUDA's gigabytes.
$(VENV)-formats/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)-formats
	$(VENV)-formats/bin/pip install -q $(TORCH)
	$(VENV)-formats/bin/pip install -q -e ".[train,formats]" hypothesis pytest "setuptools>=77" wheel \
	  accelerate datasets defuser device-smi logbar pypcre threadpoolctl tokenicer torchao zstandard
	$(VENV)-formats/bin/pip install -q --no-build-isolation --no-deps autoawq==0.2.9 gptqmodel==7.7.0
	touch $@

# `pip install -e` builds the extension in an isolated environment, as `pip install .` does.
$(VENV)/.%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e ".[$*]"
	touch $@

# zentorch is built for one version of torch, Linux and x86; elsewhere the benchmark says that it is absent.
$(VENV)/.peers: $(VENV)/.dev
	$(BIN)/pip install -q -e ".[peers]"
	$(BIN)/pip install -q "zen$(basename $(TORCH)).*" || echo "no zentorch for this machine and $(TORCH)"
	touch $@

clean: ## remove environments, builds and runs
	rm -rf $(VENV) $(VENV)-transformers-* $(VENV)-trl $(VENV)-formats build dist runs *.egg-info
	find m4ov_kernels -name '*.so' -delete
