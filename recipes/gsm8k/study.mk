# GSM8K, a look: a small model gets few of these problems right, so that the share of its equations computed right counts.
#
#     make study-gsm8k GSM8K=train.jsonl        # from the repository's root; a stopped run goes on
include recipes/common.mk
# Problems taken from the start of the file, and those after them that are asked at the end.
FIRST ?= 1400
LATER ?= 300

DATA := data/gsm8k
RUNS := runs/gsm8k
# The base fine-tuned alone; the same frozen, and the calculator asked by a gate or always; both trained together. A gate
# that is trained beside a base that sees right operands and results only asks too seldom at 0.5: so also at a rate, that
# of the calculator's tokens in the training texts, by the gate and by its expected gain. And with the arithmetic language
# model of the word problems as the assistant, and as a second one.
RATE := 07
RULES := threshold expected_gain
SYSTEMS := sft sft-calculator gate $(RULES:%=gate-%_$(RATE)) $(GATES_LM) pair

.PHONY: all help
.SECONDARY:
all: $(SYSTEMS:%=$(RUNS)/later/%.json)
	$(COLLM) compare $^ --against pair

help:
	@echo "make -f recipes/gsm8k/study.mk GSM8K=FILE [FIRST=1400] [LATER=300] [THREADS=2] [DTYPE=bfloat16] [PYTHON=...]"

$(DATA)/train.jsonl:
	$(call want,GSM8K)
	mkdir -p $(DATA)
	head -n $(FIRST) $(GSM8K) > $(DATA)/first.jsonl
	$(COLLM) prepare gsm8k $(DATA)/first.jsonl --out $(DATA) --parts train=0.7,calibration=0.1,test=0.2

$(DATA)/later.jsonl: | $(DATA)/train.jsonl
	$(call want,GSM8K)
	tail -n +$$(($(FIRST) + 1)) $(GSM8K) | head -n $(LATER) > $(DATA)/next.jsonl
	$(COLLM) prepare gsm8k $(DATA)/next.jsonl --out $(DATA) --parts later

$(RUNS)/%/collm.json: | $(DATA)/train.jsonl
	$(COLLM) train recipes/gsm8k/$*.yaml
$(RUNS)/gate/collm.json: | $(RUNS)/sft/collm.json

$(GATES_LM:%=$(RUNS)/%/collm.json): $(RUNS)/%/collm.json: | $(RUNS)/sft/collm.json $(ARITHMETIC_LM)/test.json
	$(COLLM) train recipes/gsm8k/gate.yaml out=$(RUNS)/$* $(CHANGES_$*)

WRITE := --task gsm8k --max-tokens 256 --batch-size 32 --dtype $(DTYPE)
$(RULES:%=$(RUNS)/calibration/%/curve.csv): $(RUNS)/calibration/%/curve.csv: | $(RUNS)/gate/collm.json
	$(COLLM) calibrate $(RUNS)/gate $(WRITE) --signal $(*:threshold=gate) --rates 0.$(RATE) --data $(DATA)/calibration.jsonl --out $(@D)

# The part `test` is spent: this study was judged by it before it had a rate and a pair. The calculator abstains where it
# has nothing to say, so that it can also be asked at every token.
$(RUNS)/later/sft-calculator.json: OPTIONS = --assistant calculator --method always
$(patsubst %,$(RUNS)/later/%.json,gate pair $(GATES_LM)): OPTIONS = --threshold 0.5
$(RULES:%=$(RUNS)/later/gate-%_$(RATE).json): OPTIONS = --method $(*:gate-%_$(RATE)=%) --deferral-rate 0.$(RATE)
$(SYSTEMS:%=$(RUNS)/later/%.json): $(RUNS)/later/%.json: | $(DATA)/later.jsonl $(RUNS)/sft/collm.json
	$(COLLM) eval $(RUNS)/$(firstword $(subst -, ,$*)) $(WRITE) $(OPTIONS) --data $(DATA)/later.jsonl --name $* \
	    --out $(RUNS)/later/$*.jsonl
$(RUNS)/later/gate.json: | $(RUNS)/gate/collm.json
$(patsubst %,$(RUNS)/later/%.json,pair $(GATES_LM)): $(RUNS)/later/%.json: | $(RUNS)/%/collm.json
$(foreach rule,$(RULES),$(eval $(RUNS)/later/gate-$(rule)_$(RATE).json: | $(RUNS)/calibration/$(rule)/curve.csv))
