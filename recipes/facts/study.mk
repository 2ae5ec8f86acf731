# Domain questions, closed book: a base that knows how to answer, and an expert that knows the facts.
#
#     make study-facts            # all of it, from the repository's root; a stopped run goes on
include recipes/common.mk

DATA := data/facts
RUNS := runs/facts
PAIRS := pair weak seen own
MODELS := expert base_sft expert_tuned expert_lora $(PAIRS)

ANSWERS := --task exact_match --max-tokens 64 --batch-size 32 --dtype $(DTYPE)
SHOTS := --stop 'Question:'

# What each system is: checkpoint and options; its questions are $(DATA)/test.jsonl, or test_shots.jsonl for SHOWN.
# Rates are those at which the pair, and the pair of weak supervision, did best on the calibration part.
EXPERT := --assistant expert=$(RUNS)/expert
base_sft = $(RUNS)/base_sft
expert = $(RUNS)/expert
expert_shots = $(RUNS)/expert $(SHOTS)
untouched_shots = $(MODEL) $(SHOTS)
expert_tuned = $(RUNS)/expert_tuned
expert_lora = $(RUNS)/expert_lora
pair = $(RUNS)/pair --deferral-rate $(call best,pair)
weak = $(RUNS)/weak --deferral-rate $(call best,weak)
compose = $(RUNS)/pair --method compose
random = $(RUNS)/pair --method random --deferral-rate $(call best,pair)
entropy = $(RUNS)/pair --method entropy --deferral-rate $(call best,pair)
top_probability = $(RUNS)/pair --method top_probability --deferral-rate $(call best,pair)
confident = $(RUNS)/base_sft $(EXPERT) --method confident
mixture = $(RUNS)/base_sft $(EXPERT) --method mixture
contrastive = $(RUNS)/base_sft $(EXPERT) --method contrastive
proxy_tuning = $(RUNS)/base_sft $(EXPERT) --assistant untuned=$(MODEL) --method proxy_tuning
nudging = $(RUNS)/base_sft $(EXPERT) --method nudging
expected_gain = $(RUNS)/pair --method expected_gain --deferral-rate $(call best,pair)
# And with fewer of the expert's passes.
cheap = $(RUNS)/pair --method $(1) --deferral-rate 0.1
gate_10 = $(call cheap,threshold)
expected_gain_10 = $(call cheap,expected_gain)
entropy_10 = $(call cheap,entropy)
top_probability_10 = $(call cheap,top_probability)
random_10 = $(call cheap,random)
SHOWN := expert_shots untouched_shots
GATELESS := confident mixture contrastive proxy_tuning nudging
CHEAP := gate_10 expected_gain_10 entropy_10 top_probability_10 random_10
RULED := compose random expected_gain entropy top_probability $(CHEAP)
SYSTEMS := pair base_sft expert $(SHOWN) expert_tuned expert_lora weak $(RULED) $(GATELESS)
RESULTS := $(SYSTEMS:%=$(RUNS)/test/%.json)
# Those behind worked examples were asked otherwise; paired tests are of answers to the same prompts.
COMPARED := $(filter-out $(SHOWN:%=$(RUNS)/test/%.json),$(RESULTS))

.PHONY: all help data train oracle calibrate test compare
all: oracle compare $(RUNS)/report.html

help:
	@echo "make -f recipes/facts/study.mk [data|train|oracle|calibrate|test|compare|all] [THREADS=2] [DTYPE=bfloat16] [PYTHON=...]"

data: $(DATA)/test.jsonl
train: $(MODELS:%=$(RUNS)/%/collm.json)
oracle: $(PAIRS:%=$(RUNS)/oracle/%.json)
test: $(RESULTS)

$(DATA)/test.jsonl:
	$(PYTHON) recipes/facts/prepare.py --turn $(TURN) --out $(DATA)

$(RUNS)/%/collm.json: | $(DATA)/test.jsonl
	$(COLLM) train recipes/facts/$*.yaml

$(RUNS)/expert_tuned/collm.json: | $(RUNS)/expert/collm.json
$(RUNS)/expert_lora/collm.json: | $(RUNS)/expert/collm.json
	$(COLLM) train recipes/facts/expert_tuned.yaml out=$(RUNS)/expert_lora tune=lora training.learning_rate=1.0e-3
$(PAIRS:%=$(RUNS)/%/collm.json): $(RUNS)/%/collm.json: | $(RUNS)/base_sft/collm.json $(RUNS)/expert/collm.json
	$(COLLM) train recipes/facts/pair.yaml out=$(RUNS)/$* $(CHANGES_$*)

# Variations of the pair: the gate as pseudo-labels alone fit it; the gate fitted on questions that the base has been
# fine-tuned on; the gate fitted on right answers of the pair's own, too, its writers drawn from the gate.
CHANGES_weak := objective=weak_supervision
CHANGES_seen := data.train=$(DATA)/train.jsonl
CHANGES_own := data.train=$(RUNS)/own_texts/all.jsonl
$(RUNS)/own/collm.json: | $(RUNS)/own_texts/all.jsonl

SEEDS := 1 2 3
$(SEEDS:%=$(RUNS)/own_texts/%.json): $(RUNS)/own_texts/%.json: | $(RUNS)/pair/collm.json
	$(COLLM) eval $(RUNS)/pair $(ANSWERS) --data $(DATA)/gate.jsonl --method sampled --seed $* --name own \
	    --out $(RUNS)/own_texts/$*.jsonl
$(RUNS)/own_texts/all.jsonl: | $(SEEDS:%=$(RUNS)/own_texts/%.json)
	$(PYTHON) recipes/scales/own_texts.py $(SEEDS:%=$(RUNS)/own_texts/%.jsonl) --data $(DATA)/gate.jsonl --out $@

# Token accuracy on gold text, and what deferring could gain at best.
$(RUNS)/oracle/%.json: | $(RUNS)/%/collm.json
	$(COLLM) oracle $(RUNS)/$* --data $(DATA)/calibration.jsonl --out $(RUNS)/oracle/$*.jsonl

# -- thresholds for deferral rates, on the calibration part: for the gates, and for what the rivals of the gate go by

CURVES := $(patsubst %,$(RUNS)/calibration/%/curve.csv,pair weak own)
SIGNALS := expected_gain entropy top_probability
OF_PAIR := $(RUNS)/calibration/pair/curve.csv $(SIGNALS:%=$(RUNS)/calibration/pair-%/curve.csv)
calibrate: $(CURVES) $(OF_PAIR)

# A rival shall ask as often as the pair: its rates want more steps than a curve.
ROUNDS := 2
$(SIGNALS:%=$(RUNS)/calibration/pair-%/curve.csv): ROUNDS := 4
# The rate that did best, 0.3 while there is none (make -n).
best = $(or $(shell sed -n 's/,.*,1$$//p' $(RUNS)/calibration/$(1)/curve.csv 2>/dev/null),0.3)
CALIBRATE = $(COLLM) calibrate $(RUNS)/$(1) $(ANSWERS) --data $(DATA)/calibration.jsonl --rounds $(ROUNDS)

$(CURVES): $(RUNS)/calibration/%/curve.csv: | $(RUNS)/%/collm.json
	$(call CALIBRATE,$*) --rates 0,0.1,0.2,0.3,0.4,1 --out $(RUNS)/calibration/$*

$(SIGNALS:%=$(RUNS)/calibration/pair-%/curve.csv): $(RUNS)/calibration/pair-%/curve.csv: | $(RUNS)/calibration/pair/curve.csv
	$(call CALIBRATE,pair) --signal $* --rates $(call best,pair),0.1 --out $(RUNS)/calibration/pair-$*

# -- the one look at the test part: every system at once, after everything has been chosen

$(RUNS)/test/%.json: | $(DATA)/test.jsonl
	$(COLLM) eval $($*) $(ANSWERS) --no-speculative --name $* --out $(RUNS)/test/$*.jsonl \
	    --data $(DATA)/test$(if $(filter $*,$(SHOWN)),_shots).jsonl

$(patsubst %,$(RUNS)/test/%.json,pair $(RULED)): | $(OF_PAIR)
$(RUNS)/test/weak.json: | $(RUNS)/calibration/weak/curve.csv
$(patsubst %,$(RUNS)/test/%.json,base_sft $(GATELESS)): | $(RUNS)/base_sft/collm.json
$(patsubst %,$(RUNS)/test/%.json,expert expert_shots $(GATELESS)): | $(RUNS)/expert/collm.json
$(RUNS)/test/expert_tuned.json: | $(RUNS)/expert_tuned/collm.json
$(RUNS)/test/expert_lora.json: | $(RUNS)/expert_lora/collm.json

compare: | $(RESULTS)
	$(COLLM) compare --against pair $(COMPARED)
	$(COLLM) trace $(RUNS)/test/pair.jsonl --classes

$(RUNS)/report.html: | $(RESULTS)
	$(COLLM) report $(COMPARED) --against pair --calibration $(RUNS)/pair --out $@ --title "Domain questions, closed book"
