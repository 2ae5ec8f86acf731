# Across scales: a small base, SmolLM2's first layers, asks the whole model, as published or fine-tuned on the same data.
#
#     make study-scales PROBLEMS=problems.jsonl GSM8K=train.jsonl    # from the repository's root
#
# Everything is chosen on the calibration part; PART=test_b is opened once, at the end.
include recipes/common.mk
PART ?= calibration

LAYERS := 6
DATA := data/word_problems
RUNS := runs/scales
OUT := $(RUNS)/$(PART)
TUNED := runs/word_problems/sft
RATES := 10 20 30
TASK := word_problems
ASKED = --task $(TASK) --batch-size 32 --dtype $(DTYPE)
# With the gate alone trained, beside the assistant as published and a tuned one; and base and gate trained together.
PAIRS := untouched tuned joint
# Other gates for the first two: fitted on what the base was fine-tuned on; fitted on the pair's own right answers, too.
OTHERS := untouched_seen tuned_seen untouched_own tuned_own
SYSTEMS :=

.PHONY: all help train oracle calibrate others near evaluate report
all: report others near

help:
	@echo "make -f recipes/scales/study.mk train|oracle|calibrate|others|near|evaluate|report [PART=calibration|test_b] [THREADS=2] [DTYPE=bfloat16] [PYTHON=...]"
	@echo "first: PROBLEMS=FILE (elementary word problems) and GSM8K=FILE (its train.jsonl), see docs/recipes.md"

# -- models

train: $(PAIRS:%=$(RUNS)/%/collm.json)

$(DATA)/train.jsonl:
	$(call want,PROBLEMS)
	$(PYTHON) recipes/word_problems/prepare.py $(PROBLEMS) --turn $(TURN) --out $(DATA)

data/scales/train.jsonl:
	$(call want,GSM8K)
	mkdir -p data/scales
	head -n 4000 $(GSM8K) > data/scales/first.jsonl
	$(COLLM) prepare gsm8k data/scales/first.jsonl --out data/scales --parts train=0.8,calibration=0.08,test=0.12

$(RUNS)/truncated/model.safetensors:
	$(PYTHON) recipes/scales/truncate.py $(MODEL) --layers $(LAYERS) --out $(RUNS)/truncated

$(RUNS)/%/collm.json:
	$(COLLM) train recipes/scales/$*.yaml

$(TUNED)/collm.json: | $(DATA)/train.jsonl
	$(COLLM) train recipes/word_problems/sft.yaml

$(RUNS)/healed/collm.json: | data/scales/train.jsonl $(RUNS)/truncated/model.safetensors
$(RUNS)/small/collm.json: | $(DATA)/train.jsonl $(RUNS)/healed/collm.json
$(RUNS)/untouched/collm.json: | $(RUNS)/small/collm.json
$(RUNS)/tuned/collm.json: | $(RUNS)/small/collm.json $(TUNED)/collm.json
$(RUNS)/joint/collm.json: | $(DATA)/train.jsonl $(RUNS)/healed/collm.json

# The gates are fitted on problems that no model was fine-tuned on: test A is that of the word problems' own study; here
# it is training data, and test B judges.
ALONE := untouched tuned
# What such a pair answers to the same problems where its writers are drawn from the gate; right answers are texts, too.
SEEDS := 1 2 3 4
define written
$(RUNS)/own/$(1)_$(2).json: | $(RUNS)/$(1)/collm.json
	$(COLLM) eval $$(ARGS_$(1)) $$(ASKED) --data $(DATA)/test_a.jsonl --max-tokens 64 --method sampled --seed $(2) \
	    --name own --out $(RUNS)/own/$(1)_$(2).jsonl
endef
$(foreach pair,$(ALONE),$(foreach seed,$(SEEDS),$(eval $(call written,$(pair),$(seed)))))

$(ALONE:%=$(RUNS)/own/%.jsonl): $(RUNS)/own/%.jsonl: | $(foreach seed,$(SEEDS),$(RUNS)/own/%_$(seed).json)
	$(PYTHON) recipes/scales/own_texts.py $(foreach seed,$(SEEDS),$(RUNS)/own/$*_$(seed).jsonl) \
	    --data $(DATA)/test_a.jsonl --out $@

$(ALONE:%=$(RUNS)/%_own/collm.json): $(RUNS)/%_own/collm.json: | $(RUNS)/small/collm.json
	$(COLLM) train recipes/scales/$*.yaml out=$(RUNS)/$*_own data.train=$(RUNS)/own/$*.jsonl
$(ALONE:%=$(RUNS)/%_seen/collm.json): $(RUNS)/%_seen/collm.json: | $(RUNS)/small/collm.json
	$(COLLM) train recipes/scales/$*.yaml out=$(RUNS)/$*_seen data.train=$(DATA)/train.jsonl

# The price that tuned.yaml puts on deferring is there to make its gate tell tokens apart. Where it is multiplied with the
# base's doubt, that sees to it, and the gate is fitted at no price.
$(RUNS)/tuned_free/collm.json: | $(RUNS)/small/collm.json $(TUNED)/collm.json
	$(COLLM) train recipes/scales/tuned.yaml out=$(RUNS)/tuned_free deferral_cost=0

$(ALONE:%=$(RUNS)/%_own/collm.json): $(RUNS)/%_own/collm.json: | $(RUNS)/own/%.jsonl
$(RUNS)/tuned_seen/collm.json: | $(TUNED)/collm.json

# -- thresholds for fixed rates, for the gate, the expected gain and the base's entropy; nothing is chosen by quality

ARGS_untouched := $(RUNS)/untouched --assistant full=$(MODEL)
ARGS_tuned := $(RUNS)/tuned
ARGS_tuned_free := $(RUNS)/tuned_free
ARGS_untouched_own := $(RUNS)/untouched_own --assistant full=$(MODEL)
ARGS_tuned_own := $(RUNS)/tuned_own
ARGS_untouched_seen := $(RUNS)/untouched_seen --assistant full=$(MODEL)
ARGS_tuned_seen := $(RUNS)/tuned_seen
ARGS_joint := $(RUNS)/joint --assistant full=$(MODEL)

# What deferring could gain at best, on gold text of the calibration part: whether a pair is worth its calibration.
oracle: $(PAIRS:%=$(RUNS)/oracle/%.json)

$(RUNS)/oracle/%.json: | $(RUNS)/%/collm.json
	$(COLLM) oracle $(ARGS_$*) --data $(DATA)/calibration.jsonl --out $(RUNS)/oracle/$*.jsonl

SIGNALS := gate expected_gain entropy
# Whose gate the expected gain of a pair is.
GAIN_untouched := untouched
GAIN_tuned := tuned_free
GAIN_joint := joint
THRESHOLDS := $(foreach pair,$(PAIRS),$(pair)_gate $(GAIN_$(pair))_expected_gain $(pair)_entropy)
calibrate: $(THRESHOLDS:%=$(RUNS)/thresholds/%/curve.csv)
# What other gates do, on the calibration part alone.
others: $(OTHERS:%=$(RUNS)/oracle/%.json) $(OTHERS:%=$(RUNS)/thresholds/%_gate/curve.csv) \
    $(RUNS)/thresholds/untouched_own_expected_gain/curve.csv

# What treats tokens near a threshold otherwise: hysteresis, soft mixing; on the calibration part.
near: $(RUNS)/near/untouched.json $(RUNS)/near/tuned_free.json

$(RUNS)/near/%.json: | $(RUNS)/thresholds/%_expected_gain/curve.csv
	$(PYTHON) recipes/scales/near_threshold.py $(ARGS_$*) --task $(TASK) --data $(DATA)/calibration.jsonl \
	    --max-tokens 64 --dtype $(DTYPE) --rates 0.1,0.2,0.3 --out $@

define calibration
$(RUNS)/thresholds/$(1)_$(2)/curve.csv: | $(RUNS)/$(1)/collm.json
	$(COLLM) calibrate $$(ARGS_$(1)) $(ASKED) --data $(DATA)/calibration.jsonl --max-tokens 64 \
	    --signal $(2) --rates 0.1,0.2,0.3 --rounds 4 --out $(RUNS)/thresholds/$(1)_$(2)
endef
$(foreach pair,$(PAIRS) tuned_free $(OTHERS),$(foreach signal,$(SIGNALS),$(eval $(call calibration,$(pair),$(signal)))))

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
$(eval $(call system,full,$(DATA)/train.jsonl,$(MODEL)))
$(eval $(call system,full_tuned,$(TUNED)/collm.json,$(TUNED)))
$(eval $(call system,proxy_tuning,$(RUNS)/small/collm.json,$(RUNS)/small --assistant full=$(MODEL) \
    --assistant untuned=$(RUNS)/healed --method proxy_tuning))
# Models that do not know the form: any number in their answer counts.
$(OUT)/healed.json $(OUT)/full.json: TASK := word_problems_flexible
# The large model writes, and the small one nudges it towards the form of the task.
$(eval $(call system,nudging,$(RUNS)/untouched/collm.json,$(ARGS_untouched) --method nudging))

define pair
$(call system,$(1),$(RUNS)/$(1)/collm.json,$(ARGS_$(1)))
$(foreach rate,$(RATES),
$(call system,$(1)_$(rate),$(RUNS)/thresholds/$(1)_gate/curve.csv,$(ARGS_$(1)) --deferral-rate 0.$(rate)))
endef
$(foreach name,$(PAIRS),$(eval $(call pair,$(name))))

# The same pair by its expected gain. Its rivals: doubt at its rates, and chance; laws mixed at every token.
define rivals
$(foreach rate,$(RATES),
$(call system,$(1)_gain_$(rate),$(RUNS)/thresholds/$(GAIN_$(1))_expected_gain/curve.csv,$(ARGS_$(GAIN_$(1))) \
    --method expected_gain --deferral-rate 0.$(rate)))
$(foreach rate,$(RATES),
$(call system,$(1)_entropy_$(rate),$(RUNS)/thresholds/$(1)_entropy/curve.csv,$(ARGS_$(1)) --method entropy \
    --deferral-rate 0.$(rate)))
$(foreach rate,$(RATES),
$(call system,$(1)_random_$(rate),$(RUNS)/$(1)/collm.json,$(ARGS_$(1)) --method random --deferral-rate 0.$(rate)))
endef
$(foreach name,$(PAIRS),$(eval $(call rivals,$(name))))
define mixed
$(call system,$(1)_$(2),$(RUNS)/$(1)/collm.json,$(ARGS_$(1)) --method $(2))
endef
$(foreach method,confident mixture contrastive,$(eval $(call mixed,untouched,$(method))))
$(foreach method,confident mixture,$(eval $(call mixed,tuned,$(method))))

evaluate: $(SYSTEMS:%=$(OUT)/%.json)

# -- what it comes to

$(RUNS)/cost.json:
	$(COLLM) bench --only pair --pair truncated --base $(MODEL) --layers $(LAYERS) --batch 1 --rate 0.2 --rounds 4 \
	    --tokens 32 --json $@

# $(1): a pair, $(2): its rate
define against_rivals
$(COLLM) compare --against $(1)_gain_$(2) $(foreach rule,_random _entropy _gain,$(OUT)/$(1)$(rule)_$(2).json) $(OUT)/$(1)_$(2).json

endef

report: evaluate | $(RUNS)/cost.json
	$(PYTHON) recipes/scales/retention.py $(OUT) --bench $(RUNS)/cost.json --out $(OUT)
	$(COLLM) compare --against small $(SYSTEMS:%=$(OUT)/%.json)
	$(foreach pair,$(PAIRS),$(foreach rate,$(RATES),$(call against_rivals,$(pair),$(rate))))
