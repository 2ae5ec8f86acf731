# Two models of one family that people know, Qwen2.5-Coder-Instruct of 0.5B and 1.5B (Q4_K_M): what does the small one gain
# by asking the large one, at which rate, on GSM8K, MBPP and IFEval? Qwen may have seen them: the gains are relative.
#
#     make study-qwen GSM8K=train.jsonl MBPP=mbpp.jsonl IFEVAL=ifeval.jsonl        # from the repository's root
#
# Days on two cores, in steps; each may be stopped at any time, also by `timeout 30m`, and goes on where it was. Everything
# is chosen on the calibration parts; the test parts are opened once for all systems (`make ... test`).
include recipes/common.mk
MBPP ?= mbpp.jsonl
IFEVAL ?= ifeval.jsonl
# Where the models' folders lie; HUB=1 (with HF_HUB_OFFLINE=0) takes the hub's own instead, not tried so far.
HUB ?=
WEIGHTS ?= $(if $(HUB),Qwen,weights)
# Where there is a GPU: DEVICE=cuda.
DEVICE ?= cpu
# Problems of each test part, its first ones; a whole part has more (TESTED=1000). With 150, a difference of about 11 points
# is found four times in five, where two systems differ on a quarter of them.
TESTED ?= 150
# Problems that each threshold is tried on.
TRIED ?= 60
# Texts that are written at a time. A core with bfloat16 writes 1.5 times as many tokens a second with 32 as with 16.
BATCH ?= 16

# Scores that were made already, for those who do not want to wait: used if they are of these very weights and data.
KEPT ?= $(if $(HUB),,recipes/qwen/scores)

DATA := data/qwen
include recipes/qwen/data.mk
RUNS := runs/qwen
BASE := $(WEIGHTS)/Qwen2.5-Coder-0.5B-Instruct
LARGE := $(WEIGHTS)/Qwen2.5-Coder-1.5B-Instruct
FOLDERS := $(BASE)/config.json $(LARGE)/config.json
HAVE := $(if $(HUB),,$(FOLDERS))
ASSISTANT := --assistant large=$(LARGE)

# On the first two: every system. IFEval has no training text: answers of the large model's own to prompts of a generator's
# (recipes/instructions), kept if the checker accepts them; the pair is asked at one rate.
FULL := gsm8k mbpp
TASKS := $(FULL) ifeval
# What an answer is worth: neither model was taught GSM8K's mark, and any number counts that they mean.
RULE_gsm8k := gsm8k_flexible
RULE_mbpp := mbpp
RULE_ifeval := ifeval
LONG_gsm8k := 400
LONG_mbpp := 400
LONG_ifeval := 1280
WRITE = --task $(RULE_$(1)) --max-tokens $(LONG_$(1)) --batch-size $(BATCH) --dtype $(DTYPE) --device $(DEVICE)
MACHINE := --dtype $(DTYPE) --device $(DEVICE)

# Fine-tuned alone; the gate alone beside the base as it was published; LoRA and gate together.
MODELS := sft gate pair
RATES := 10 20 40
SIGNALS := gate expected_gain entropy

.PHONY: all help data kept scores train calibrate oracle test
.SECONDARY:
all: oracle calibrate test

help:
	@echo "make -f recipes/qwen/study.mk [data|kept|scores|train|oracle|calibrate|test|own|calculator] GSM8K=FILE MBPP=FILE IFEVAL=FILE [HUB=1 | WEIGHTS=weights] [DEVICE=cpu] [TESTED=150] [TRIED=60] [BATCH=16] [THREADS=2] [DTYPE=bfloat16] [PYTHON=...]"

# -- weights and data --------------------------------------------------------------------------------------------------

# Makes whichever is missing.
$(FOLDERS):
	$(PYTHON) recipes/qwen/weights.py --out $(WEIGHTS)

data: $(TASKS:%=$(DATA)/%/train.jsonl)

# Texts to learn instructions from, and those that training is watched by: what the large model wrote, if it is right.
PROMPTS := $(DATA)/instructions
PARTS := train calibration
# By which IFEval's checker tells sentences. Nothing is fetched where NLTK has it already.
NLTK := $(abspath $(DATA))/nltk
SENTENCES := $(NLTK)/tokenizers/punkt_tab/README
export NLTK_DATA := $(if $(NLTK_DATA),$(NLTK_DATA):)$(NLTK)
$(SENTENCES):
	$(PYTHON) recipes/qwen/sentences.py --out $(NLTK)
$(PROMPTS)/held_out.jsonl:
	$(call want,IFEVAL)
	$(PYTHON) recipes/instructions/prompts.py --apart-from $(IFEVAL) --out $(PROMPTS)

$(PARTS:%=$(RUNS)/ifeval/own/%.json): $(RUNS)/ifeval/own/%.json: | $(PROMPTS)/held_out.jsonl $(SENTENCES) $(HAVE)
	$(COLLM) eval $(LARGE) $(call WRITE,ifeval) --data $(PROMPTS)/$*.jsonl --temperature 0.8 --top-p 0.95 --seed 1 \
	    --name own --out $(RUNS)/ifeval/own/$*.jsonl
$(DATA)/ifeval/train.jsonl: | $(PARTS:%=$(RUNS)/ifeval/own/%.json) $(SENTENCES)
	$(call want,IFEVAL)
	$(COLLM) prepare ifeval $(IFEVAL) --out $(DATA)/ifeval --parts test
	$(foreach part,calibration train,$(PYTHON) recipes/scales/own_texts.py $(RUNS)/ifeval/own/$(part).jsonl \
	    --data $(PROMPTS)/$(part).jsonl --out $(DATA)/ifeval/$(part).jsonl &&) true

# Pairs, thresholds and results that were made already; scores are taken one by one.
kept:
	mkdir -p $(RUNS)
	cd recipes/qwen/kept && find */ -type f | while read -r each; do to=$(abspath $(RUNS))/$$each; \
	    test -e $$to || { mkdir -p $$(dirname $$to) && cp $$each $$to.tmp && mv $$to.tmp $$to; } || exit 1; \
	    case $$to in *.jsonl.xz) test -e $${to%.xz} || \
	    { xz -dc $$to > $$to.tmp && mv $$to.tmp $${to%.xz}; } || exit 1;; esac; done

# -- scores and models -------------------------------------------------------------------------------------------------

SPEC_base := $(BASE)
SPEC_large := $(LARGE)
# $(1): a task, $(2): base or large, $(3): a part
define scored
scores: $(RUNS)/scores/$(1)/$(2)-$(3)/scores.json
$(RUNS)/scores/$(1)/$(2)-$(3)/scores.json: | $(DATA)/$(1)/train.jsonl $(HAVE)
	$(if $(and $(KEPT),$(wildcard $(KEPT)/$(1)/$(2)-$(3))),mkdir -p $(RUNS)/scores/$(1) && cp -r $(KEPT)/$(1)/$(2)-$(3) $(RUNS)/scores/$(1)/)
	$(COLLM) score $(DATA)/$(1)/$(3).jsonl --model $(SPEC_$(2)) --base $(BASE) --max-length 512 $(MACHINE) \
	    --out $(RUNS)/scores/$(1)/$(2)-$(3)
$(RUNS)/$(1)/gate/collm.json $(RUNS)/$(1)/pair/collm.json: | $(RUNS)/scores/$(1)/$(2)-$(3)/scores.json
endef
$(foreach task,$(TASKS),$(foreach part,train calibration,$(foreach model,large base,\
    $(eval $(call scored,$(task),$(model),$(part))))))

comma := ,
# The recipes are for GSM8K; those for the others differ in their paths. $(1): a task, $(2): a model
CHANGES = out=$(RUNS)/$(1)/$(2) base.model=$(BASE) data.train=$(DATA)/$(1)/train.jsonl \
    data.validation=$(DATA)/$(1)/calibration.jsonl
BASE_SCORES = $(foreach split,train calibration,base.$(if $(filter train,$(split)),,validation_)scores=$(RUNS)/scores/$(1)/base-$(split))
SCORED_LARGE = {name: large$(comma) model: $(LARGE)$(comma) dtype: bfloat16$(comma) \
    scores: $(RUNS)/scores/$(1)/large-train$(comma) validation_scores: $(RUNS)/scores/$(1)/large-calibration}
SCORES = $(BASE_SCORES) 'assistants=[$(SCORED_LARGE)]'
# $(1): a task, $(2): a model
define model
train: $(RUNS)/$(1)/$(2)/collm.json
$(RUNS)/$(1)/$(2)/collm.json: | $(DATA)/$(1)/train.jsonl $(HAVE)
	$(COLLM) train recipes/qwen/$(2).yaml $(CHANGES) $(if $(filter-out sft,$(2)),$(SCORES))
endef
MODELS_gsm8k := $(MODELS)
MODELS_mbpp := $(MODELS)
MODELS_ifeval := sft pair
$(foreach task,$(TASKS),$(foreach name,$(MODELS_$(task)),$(eval $(call model,$(task),$(name)))))

# What deferring could gain at best, on gold text: whether a pair is worth its calibration.
# $(1): a task, $(2): a pair
define oracle_of
oracle: $(RUNS)/$(1)/oracle/$(2).json
$(RUNS)/$(1)/oracle/$(2).json: | $(RUNS)/$(1)/$(2)/collm.json $(HAVE)
	$(COLLM) oracle $(RUNS)/$(1)/$(2) --data $(DATA)/$(1)/calibration.jsonl --limit $(TRIED) $(MACHINE) \
	    --out $(RUNS)/$(1)/oracle/$(2).jsonl
endef
$(foreach task,$(FULL),$(foreach pair,gate pair,$(eval $(call oracle_of,$(task),$(pair)))))

# -- thresholds for fixed rates; nothing is chosen by quality ----------------------------------------------------------

TRIES = $(if $(filter ifeval,$(1)),$(PROMPTS)/held_out.jsonl,$(DATA)/$(1)/calibration.jsonl)
# $(1): a task, $(2): a pair, $(3): a signal, $(4): rates
define calibration
calibrate: $(RUNS)/$(1)/thresholds/$(2)-$(3)/curve.csv
$(call calibrated,$(1),$(2),$(3),$(4))
endef
# The step by itself, which `make calibrate` does not ask for.
define calibrated
$(RUNS)/$(1)/thresholds/$(2)-$(3)/curve.csv: | $(RUNS)/$(1)/$(2)/collm.json $(HAVE)
	$(COLLM) calibrate $(RUNS)/$(1)/$(2) $(call WRITE,$(1)) --data $(TRIES) --limit $(TRIED) \
	    --signal $(3) --rates $(4) --rounds 3 --out $(RUNS)/$(1)/thresholds/$(2)-$(3)
endef
EACH := 0.1$(comma)0.2$(comma)0.4
$(foreach task,$(FULL),$(foreach pair,gate pair,$(foreach signal,$(SIGNALS),\
    $(eval $(call calibration,$(task),$(pair),$(signal),$(EACH))))))
$(foreach signal,gate entropy,$(eval $(call calibration,ifeval,pair,$(signal),0.2)))

# -- the one look at the test parts ------------------------------------------------------------------------------------

# $(1): a task, $(2): a system's name, $(3): what must be there, $(4): checkpoint and options. Plain decoding, whose cost
# is exact: each token one pass of the base, each deferral one of the assistant.
define system
SYSTEMS_$(1) += $(2)
$(call tested,$(1),$(2),$(3),$(4))
endef
# The step by itself, of a system that is none of the task's table.
define tested
$(RUNS)/$(1)/test/$(2).json: | $(3) $(DATA)/$(1)/train.jsonl
	$(COLLM) eval $(4) $(call WRITE,$(1)) --data $(DATA)/$(1)/test.jsonl --limit $(TESTED) --no-speculative \
	    --name $(2) --out $(RUNS)/$(1)/test/$(2).jsonl
endef

# $(1): a task
define alone
$(call system,$(1),small,$(HAVE),$(BASE))
$(call system,$(1),large,$(HAVE),$(LARGE))
$(call system,$(1),sft,$(RUNS)/$(1)/sft/collm.json,$(RUNS)/$(1)/sft)
endef
define mixed
$(call system,$(1),proxy_tuning,$(RUNS)/$(1)/sft/collm.json $(HAVE),$(RUNS)/$(1)/sft $(ASSISTANT) --assistant untuned=$(BASE) --method proxy_tuning)
$(call system,$(1),nudging,$(RUNS)/$(1)/sft/collm.json $(HAVE),$(RUNS)/$(1)/sft $(ASSISTANT) --method nudging)
$(foreach method,confident mixture,
$(call system,$(1),$(method),$(RUNS)/$(1)/pair/collm.json $(HAVE),$(RUNS)/$(1)/pair --method $(method)))
endef
$(foreach task,$(TASKS),$(eval $(call alone,$(task))))
$(foreach task,$(FULL),$(eval $(call mixed,$(task))))

METHOD_gate := threshold
METHOD_expected_gain := expected_gain
METHOD_entropy := entropy
# $(1): a task, $(2): a pair, $(3): a signal, $(4): a rate in percent
define at_rate
$(call system,$(1),$(2)-$(3)_$(4),$(RUNS)/$(1)/thresholds/$(2)-$(3)/curve.csv,$(RUNS)/$(1)/$(2) --method $(METHOD_$(3)) --deferral-rate 0.$(4))
endef
# $(1): a task, $(2): a pair, $(3): a rate in percent
define at_random
$(call system,$(1),$(2)-random_$(3),$(RUNS)/$(1)/$(2)/collm.json $(HAVE),$(RUNS)/$(1)/$(2) --method random --deferral-rate 0.$(3))
endef
$(foreach task,$(FULL),$(foreach rate,$(RATES),$(foreach pair,gate pair,\
    $(eval $(call at_random,$(task),$(pair),$(rate)))\
    $(foreach signal,$(SIGNALS),$(eval $(call at_rate,$(task),$(pair),$(signal),$(rate)))))))

$(foreach signal,gate entropy,$(eval $(call at_rate,ifeval,pair,$(signal),20)))

# Paired exact tests, Holm over each table.
define compared
test: $(RUNS)/$(1)/test/report.html
$(RUNS)/$(1)/test/report.html: | $(SYSTEMS_$(1):%=$(RUNS)/$(1)/test/%.json)
	$(COLLM) compare $(SYSTEMS_$(1):%=$(RUNS)/$(1)/test/%.json) --against pair-gate_20
	$(COLLM) report $(SYSTEMS_$(1):%=$(RUNS)/$(1)/test/%.json) --against pair-gate_20 \
	    --title "Qwen2.5-Coder 0.5B and 1.5B (Q4_K_M): $(1)" --out $(RUNS)/$(1)/test/report.html
endef
$(foreach task,$(TASKS),$(eval $(call compared,$(task))))

include recipes/qwen/calculator.mk
include recipes/qwen/own.mk
