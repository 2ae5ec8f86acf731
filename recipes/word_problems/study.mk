# Reasoning: elementary word problems, a small model and assistants that can calculate.
#
#     make study-word_problems PROBLEMS=problems.jsonl    # all of it, from the repository's root; a stopped run goes on
include recipes/common.mk

STUDY := recipes/word_problems
DATA := data/word_problems
RUNS := runs/word_problems
WRITE := --task word_problems --max-tokens 128 --batch-size 32 --dtype $(DTYPE)

# The base is trained with its gate in PAIRS; in GATES it is the fine-tuned one, frozen, so that all their rivals have the
# very same models: beside the calculator, the arithmetic language model, and both.
PAIRS := pair lora weak pair_lm both
GATES := gate gate_lm gate_both
SYSTEMS := sft $(PAIRS) $(GATES) arithmetic_tuned

.PHONY: all help data train calibrate test ablations
.SECONDARY:
all: test ablations

help:
	@echo "make -f $(STUDY)/study.mk [data|train|calibrate|test|ablations] PROBLEMS=FILE [THREADS=2] [DTYPE=bfloat16] [PYTHON=...]"

# -- data and models ---------------------------------------------------------------------------------------------------

data: $(DATA)/train.jsonl

$(DATA)/train.jsonl:
	$(call want,PROBLEMS)
	$(PYTHON) $(STUDY)/prepare.py $(PROBLEMS) --turn $(TURN) --out $(DATA)

train: $(SYSTEMS:%=$(RUNS)/%/collm.json)

RECIPES := sft $(PAIRS) gate arithmetic_tuned
$(SYSTEMS:%=$(RUNS)/%/collm.json): | $(DATA)/train.jsonl
$(RECIPES:%=$(RUNS)/%/collm.json): $(RUNS)/%/collm.json:
	$(COLLM) train $(STUDY)/$*.yaml

$(GATES_LM:%=$(RUNS)/%/collm.json): $(RUNS)/%/collm.json:
	$(COLLM) train $(STUDY)/gate.yaml out=$(RUNS)/$* $(CHANGES_$*)

$(patsubst %,$(RUNS)/%/collm.json,pair_lm both arithmetic_tuned $(GATES_LM)): | $(ARITHMETIC_LM)/test.json
$(GATES:%=$(RUNS)/%/collm.json): | $(RUNS)/sft/collm.json

# -- thresholds, on the calibration part -------------------------------------------------------------------------------

comma := ,
# The rivals of the gate shall defer as often as it does at 0.5, in its own calibration (0.2 while there is none: make -n).
rate = $(or $(shell awk -F, '$$4 == 0 {printf "%.3f", $$2}' $(RUNS)/calibration/$(1)/curve.csv 2>/dev/null),0.2)
SIGNALS := expected_gain entropy top_probability
# The calculator abstains at most tokens. `pair-random` asks it as often as the gate does, and `gate-random` so often that
# it writes as much; without abstaining, the one is the other.
SIGNALS_pair := $(SIGNALS)
SIGNALS_gate := $(SIGNALS) random
SIGNALS_gate_lm := $(SIGNALS)
RULED := pair gate gate_lm
RIVALS := $(foreach pair,$(RULED),$(SIGNALS_$(pair):%=$(pair)-%))
# How good the same two models are at a third of that rate, in percent.
FEW_gate := 05
FEW_gate_lm := 10
CHEAP := $(foreach pair,gate gate_lm,$(patsubst %,$(pair)-%_$(FEW_$(pair)),gate expected_gain entropy random))

calibrate: $(RULED:%=$(RUNS)/calibration/%/curve.csv) $(RIVALS:%=$(RUNS)/calibration/%/curve.csv)

$(RULED:%=$(RUNS)/calibration/%/curve.csv): $(RUNS)/calibration/%/curve.csv: | $(RUNS)/%/collm.json
	$(COLLM) calibrate $(RUNS)/$* $(WRITE) --data $(DATA)/calibration.jsonl --rates 0,0.05,0.1,1 --rounds 1 \
	    --out $(RUNS)/calibration/$*

# $(1): a pair, $(2): a signal
define rival
$(RUNS)/calibration/$(1)-$(2)/curve.csv: | $(RUNS)/calibration/$(1)/curve.csv
	$(COLLM) calibrate $(RUNS)/$(1) $(WRITE) --signal $(2) --data $(DATA)/calibration.jsonl \
	    --rates $$(call rate,$(1))$(FEW_$(1):%=$$(comma)0.%) --rounds 3 --out $(RUNS)/calibration/$(1)-$(2)
$(RUNS)/test_b/$(1)-$(2).json: CHECKPOINT = $(RUNS)/$(1)
$(RUNS)/test_b/$(1)-$(2).json: OPTIONS = --method $(2) --deferral-rate $$(call rate,$(1))
$(RUNS)/test_b/$(1)-$(2).json $(FEW_$(1):%=$(RUNS)/test_b/$(1)-$(2)_%.json): | $(RUNS)/calibration/$(1)-$(2)/curve.csv
endef
$(foreach pair,$(RULED),$(foreach signal,$(SIGNALS_$(pair)),$(eval $(call rival,$(pair),$(signal)))))

# -- the final evaluation, once, on test B -----------------------------------------------------------------------------

# Rivals that need no gate, beside the base that was fine-tuned alone. Laws mixed at every token want whole laws, which
# a calculator has not; it abstains where it has nothing to say, so that it can always be asked.
MIXED := confident mixture contrastive nudging proxy_tuning
TESTS := untouched calculator arithmetic_lm $(SYSTEMS) $(RIVALS) $(CHEAP) pair-random gate_lm-random gate_lm-compose \
    sft-calculator $(MIXED:%=sft-%)
CHECKPOINT = $(RUNS)/$*
OPTIONS =
HOW = $(WRITE)

test: $(RUNS)/test_b/report.html

$(TESTS:%=$(RUNS)/test_b/%.json): $(RUNS)/test_b/%.json: | $(DATA)/train.jsonl
	$(COLLM) eval $(CHECKPOINT) $(HOW) $(OPTIONS) --data $(DATA)/test_b.jsonl --name $* --out $(RUNS)/test_b/$*.jsonl

$(SYSTEMS:%=$(RUNS)/test_b/%.json): $(RUNS)/test_b/%.json: | $(RUNS)/%/collm.json
$(RUNS)/test_b/calculator.json $(RUNS)/test_b/pair-random.json: | $(RUNS)/pair/collm.json
$(RUNS)/test_b/gate_lm-random.json $(RUNS)/test_b/gate_lm-compose.json: | $(RUNS)/gate_lm/collm.json
$(RUNS)/test_b/pair-random.json: | $(RUNS)/calibration/pair/curve.csv
$(RUNS)/test_b/gate_lm-random.json: | $(RUNS)/calibration/gate_lm/curve.csv
$(RUNS)/test_b/sft-calculator.json $(MIXED:%=$(RUNS)/test_b/sft-%.json): | $(RUNS)/sft/collm.json
$(RUNS)/test_b/arithmetic_lm.json $(MIXED:%=$(RUNS)/test_b/sft-%.json): | $(ARITHMETIC_LM)/test.json

# The model as it came: the prompt and the rule that did best for it on the calibration part.
$(RUNS)/test_b/untouched.json: CHECKPOINT = $(MODEL)
$(RUNS)/test_b/untouched.json: HOW = --task word_problems_flexible --max-tokens 160 --batch-size 32 --dtype $(DTYPE)
$(RUNS)/test_b/calculator.json: CHECKPOINT = $(RUNS)/pair
$(RUNS)/test_b/calculator.json: OPTIONS = --alone calculator
$(patsubst %,$(RUNS)/test_b/%.json,$(PAIRS) $(GATES)): OPTIONS = --threshold 0.5
$(RUNS)/test_b/pair-random.json: CHECKPOINT = $(RUNS)/pair
$(RUNS)/test_b/pair-random.json: OPTIONS = --method random --threshold $(call rate,pair)
$(RUNS)/test_b/gate_lm-random.json: CHECKPOINT = $(RUNS)/gate_lm
$(RUNS)/test_b/gate_lm-random.json: OPTIONS = --method random --deferral-rate $(call rate,gate_lm)
$(RUNS)/test_b/gate_lm-compose.json: CHECKPOINT = $(RUNS)/gate_lm
$(RUNS)/test_b/gate_lm-compose.json: OPTIONS = --method compose
# $(1): a pair, $(2): a rule
define cheap
$(RUNS)/test_b/$(1)-$(2)_$(FEW_$(1)).json: CHECKPOINT = $(RUNS)/$(1)
$(RUNS)/test_b/$(1)-$(2)_$(FEW_$(1)).json: OPTIONS = --method $(2:gate=threshold) --deferral-rate 0.$(FEW_$(1))
$(RUNS)/test_b/$(1)-$(2)_$(FEW_$(1)).json: | $(RUNS)/calibration/$(1)/curve.csv
endef
$(foreach pair,gate gate_lm,$(foreach rule,gate expected_gain entropy random,$(eval $(call cheap,$(pair),$(rule)))))
$(RUNS)/test_b/sft-calculator.json: CHECKPOINT = $(RUNS)/sft
$(RUNS)/test_b/sft-calculator.json: OPTIONS = --assistant calculator --method always
$(MIXED:%=$(RUNS)/test_b/sft-%.json): CHECKPOINT = $(RUNS)/sft
$(MIXED:%=$(RUNS)/test_b/sft-%.json): OPTIONS = --assistant arithmetic=$(ARITHMETIC_LM) --method $(@F:sft-%.json=%) \
    $(UNTUNED)
$(RUNS)/test_b/sft-proxy_tuning.json: UNTUNED = --assistant untuned=$(MODEL)

$(RUNS)/test_b/report.html: | $(TESTS:%=$(RUNS)/test_b/%.json)
	$(COLLM) compare $(TESTS:%=$(RUNS)/test_b/%.json) --against pair
	$(COLLM) report $(TESTS:%=$(RUNS)/test_b/%.json) --against pair --title "Word problems" --out $@

# -- ablations, on the calibration part at the threshold 0.5 -----------------------------------------------------------

# What each variation of gate.yaml changes. What collapses without initialisation is training together, and soon.
# Unseen: the gate fitted on problems that the base was not fine-tuned on; test A is spent, and test B judges.
VARIED := method_b no_initialisation weak cost_0.03 cost_0.1 cost_0.3 slow unseen
VARIED_LM := unseen
CHANGES_method_b := init.method=b
CHANGES_no_initialisation := init.method=none
CHANGES_weak := objective=weak_supervision
CHANGES_cost_0.03 := deferral_cost=0.03
CHANGES_cost_0.1 := deferral_cost=0.1
CHANGES_cost_0.3 := deferral_cost=0.3
CHANGES_slow := training.gate_learning_rate=1.0e-3
CHANGES_unseen := data.train=$(DATA)/test_a.jsonl
CHANGES_pair-no_initialisation := init.method=none training.epochs=0.5 training.evaluations=2
VARIATIONS := $(VARIED:%=gate-%) $(VARIED_LM:%=gate_lm-%) pair-no_initialisation
ABLATIONS := sft $(PAIRS) $(GATES) $(VARIATIONS)

# Thresholds read off gold text, beside those of `calibrate`.
GOLD := $(RUNS)/ablations/gold

ablations: $(ABLATIONS:%=$(RUNS)/ablations/%.json) $(GOLD)/pair/teacher_forced.json $(GOLD)/gate_lm/teacher_forced.json
	$(COLLM) compare $(ABLATIONS:%=$(RUNS)/ablations/%.json) --against pair

# The recipe is that before the "-": pair.yaml, or gate.yaml with what makes it gate_lm.
$(VARIATIONS:%=$(RUNS)/ablations/runs/%/collm.json): $(RUNS)/ablations/runs/%/collm.json: | $(RUNS)/sft/collm.json
	$(COLLM) train $(STUDY)/$(firstword $(subst _, ,$(subst -, ,$*))).yaml $(CHANGES_$(firstword $(subst -, ,$*))) \
	    $(or $(CHANGES_$*),$(CHANGES_$(lastword $(subst -, ,$*)))) out=$(RUNS)/ablations/runs/$*
$(VARIED_LM:%=$(RUNS)/ablations/runs/gate_lm-%/collm.json): | $(ARITHMETIC_LM)/test.json

$(ABLATIONS:%=$(RUNS)/ablations/%.json): $(RUNS)/ablations/%.json: | $(DATA)/train.jsonl
	$(COLLM) eval $(CHECKPOINT) $(WRITE) $(OPTIONS) --data $(DATA)/calibration.jsonl --name $* \
	    --out $(RUNS)/ablations/$*.jsonl

OTHERS := $(filter-out $(VARIATIONS),$(ABLATIONS))
$(OTHERS:%=$(RUNS)/ablations/%.json): $(RUNS)/ablations/%.json: | $(RUNS)/%/collm.json
$(VARIATIONS:%=$(RUNS)/ablations/%.json): $(RUNS)/ablations/%.json: | $(RUNS)/ablations/runs/%/collm.json
$(VARIATIONS:%=$(RUNS)/ablations/%.json): CHECKPOINT = $(RUNS)/ablations/runs/$*
$(patsubst %,$(RUNS)/ablations/%.json,$(filter-out sft,$(ABLATIONS))): OPTIONS = --threshold 0.5

$(GOLD)/%/teacher_forced.json: | $(RUNS)/%/collm.json
	$(PYTHON) $(STUDY)/teacher_forced.py $(RUNS)/$* --data $(DATA)/calibration.jsonl --rates 0.05,0.1 --dtype $(DTYPE) \
	    --out $(GOLD)/$*
