# Models of two families, with different tokenizers: what does SmolLM2-135M gain by asking Qwen2.5-Coder-Instruct of 0.5B or
# 1.5B, at which rate, on GSM8K and MBPP? Beside each model alone, the base's own doubt and chance at the same rates.
#
#     make -f recipes/families/study.mk GSM8K=train.jsonl MBPP=mbpp.jsonl        # from the repository's root
#
# Days on two cores, in steps; each may be stopped at any time and goes on where it was. Everything is chosen on the
# calibration parts; the test parts are opened once for all systems (`make ... test`). What was run is in docs/results.md;
# the rest was looked at (`make -n`), and tests/test_chunk_commands.py runs its commands for tiny models.
include recipes/common.mk
MBPP ?= mbpp.jsonl
WEIGHTS ?= weights
DEVICE ?= cpu
# Problems of each test part; with 150, a difference of about 11 points is found four times in five, where two systems differ
# on a quarter of them.
TESTED ?= 150
# Problems that each threshold is tried on.
TRIED ?= 60

comma := ,
DATA := data/families
include recipes/qwen/data.mk
RUNS := runs/families
TASKS := gsm8k mbpp
ASSISTANTS := half large
SPEC_half := $(WEIGHTS)/Qwen2.5-Coder-0.5B-Instruct
SPEC_large := $(WEIGHTS)/Qwen2.5-Coder-1.5B-Instruct
SPEC_gemma := $(WEIGHTS)/gemma-3-270m
HAVE := $(foreach name,$(ASSISTANTS),$(SPEC_$(name))/config.json)
RULE_gsm8k := gsm8k_flexible
RULE_mbpp := mbpp
WRITE = --task $(RULE_$(1)) --max-tokens 400 --batch-size 16 --dtype $(DTYPE) --device $(DEVICE)
RATES := 10 20 40
SIGNALS := gate expected_gain entropy
METHOD_gate := threshold
METHOD_expected_gain := expected_gain
METHOD_entropy := entropy

.PHONY: all help look look-large look-gemma look-mbpp small small-pair small-mbpp data cuts train oracle calibrate test
.SECONDARY:
all: cuts oracle calibrate test

help:
	@echo "make -f recipes/families/study.mk [look|look-large|look-gemma|look-mbpp|small|small-pair|small-mbpp|data|cuts|train|oracle|calibrate|test] GSM8K=FILE MBPP=FILE [WEIGHTS=weights] [DEVICE=cpu] [TESTED=150] [TRIED=60] [THREADS=2] [DTYPE=bfloat16] [PYTHON=...]"

$(HAVE):
	$(PYTHON) recipes/qwen/weights.py --out $(WEIGHTS)
# As pretrained, it has no chat template.
$(SPEC_gemma)/chat_template.jinja: recipes/families/plain.jinja
	$(PYTHON) recipes/qwen/weights.py --out $(WEIGHTS) --only gemma-3-270m
	cp recipes/families/plain.jinja $@.tmp
	mv $@.tmp $@

data: $(TASKS:%=$(DATA)/%/train.jsonl)

# The smallest honest parts, an hour each: the gate alone, judged on gold text. `look`: GSM8K and the 0.5B, 200 problems (of
# those that other studies have spent), judged on 100 of the calibration part. `look-large`: the same with the 1.5B.
# `look-mbpp`: MBPP's 374 of training and the 0.5B, judged on 60 of its calibration part. Scores that are kept are used if
# they are of these very weights and data.
LOOK := $(DATA)/gsm8k/look
KEPT := recipes/families/scores
look: look-gsm8k-half
look-large: look-gsm8k-large
look-mbpp: look-mbpp-half
$(LOOK)-test.jsonl: | $(DATA)/gsm8k/train.jsonl
	head -n 200 $(DATA)/gsm8k/spent.jsonl > $(LOOK)-train.jsonl
	head -n 42 $(DATA)/gsm8k/calibration.jsonl > $(LOOK)-validation.jsonl
	tail -n +43 $(DATA)/gsm8k/calibration.jsonl > $@.tmp
	mv $@.tmp $@
$(DATA)/mbpp/look-test.jsonl: | $(DATA)/mbpp/train.jsonl
	cp $(DATA)/mbpp/train.jsonl $(DATA)/mbpp/look-train.jsonl
	head -n 30 $(DATA)/mbpp/calibration.jsonl > $(DATA)/mbpp/look-validation.jsonl
	tail -n +31 $(DATA)/mbpp/calibration.jsonl > $@.tmp
	mv $@.tmp $@
# $(1): a task, $(2): who is scored, $(3): a part, $(4): the weights, and among whom
define look_scores
$(RUNS)/scores/$(1)/$(2)-$(3)/scores.json: | $(DATA)/$(1)/look-test.jsonl $(HAVE)
	mkdir -p $(RUNS)/scores/$(1)
	$(if $(wildcard $(KEPT)/$(1)/$(2)-$(3)),cp -r $(KEPT)/$(1)/$(2)-$(3) $(RUNS)/scores/$(1)/)
	$(COLLM) score $(DATA)/$(1)/$(3).jsonl $(4) --max-length 512 --dtype bfloat16 --out $(RUNS)/scores/$(1)/$(2)-$(3)
endef
# All sizes of Qwen have one tokenizer, so that the base's chunks are the same beside each.
$(foreach task,$(TASKS),$(foreach part,look-train calibration,\
    $(eval $(call look_scores,$(task),base,$(part),--model $(MODEL) --with $(SPEC_half)))\
    $(foreach name,$(ASSISTANTS),$(eval $(call look_scores,$(task),$(name),$(part),--model $(SPEC_$(name)) --base $(MODEL))))))
# $(1): a task, $(2): an assistant, $(3): where its scores lie, $(4): the pair's folder
define look_of
.PHONY: look-$(1)-$(2)
look-$(1)-$(2): $(4)-oracle.json
	$(PYTHON) recipes/families/gold.py --base $(3)/base-calibration --assistant $(3)/$(2)-calibration \
	    --reading $(4)-oracle.jsonl --data $(DATA)/$(1)/look-test.jsonl --rate 0.1 --rate 0.2 --rate 0.4
	$(PYTHON) recipes/families/paired.py $(4)-oracle.jsonl
$(4)-oracle.json: | $(4)/collm.json
	$(COLLM) oracle $(4) --data $(DATA)/$(1)/look-test.jsonl --dtype bfloat16 --rates 0.05,0.1,0.2,0.4,0.6 --out $(4)-oracle.jsonl
$(4)/collm.json: | $(foreach name,base $(2),$(3)/$(name)-look-train/scores.json $(3)/$(name)-calibration/scores.json)
	$(COLLM) train recipes/families/gate.yaml out=$(4) base.model=$(MODEL) \
	    data.train=$(DATA)/$(1)/look-train.jsonl data.validation=$(DATA)/$(1)/look-validation.jsonl \
	    base.scores=$(3)/base-look-train base.validation_scores=$(3)/base-calibration \
	    'assistants=[{name: qwen$(comma) model: $(SPEC_$(2))$(comma) dtype: bfloat16$(comma) scores: $(3)/$(2)-look-train$(comma) \
	    validation_scores: $(3)/$(2)-calibration}]'
endef
$(foreach task,$(TASKS),$(foreach name,$(ASSISTANTS),\
    $(eval $(call look_of,$(task),$(name),$(RUNS)/scores/$(task),$(RUNS)/$(task)/look-$(name)))))

# Three families: the 0.5B and Gemma-3-270M beside the same base, as `look`. The table of cuts is another one with a third
# tokenizer, so that all three are scored anew.
THREE := $(RUNS)/gsm8k/look-three
THREE_SCORES := $(RUNS)/scores/gsm8k-three
AMONG_base := --model $(MODEL) --with $(SPEC_half) --with $(SPEC_gemma)
AMONG_half := --model $(SPEC_half) --base $(MODEL) --with $(SPEC_gemma)
AMONG_gemma := --model $(SPEC_gemma) --base $(MODEL) --with $(SPEC_half)
# $(1): who is scored, $(2): a part
define three_scores
$(THREE_SCORES)/$(1)-$(2)/scores.json: | $(LOOK)-test.jsonl $(SPEC_half)/config.json $(SPEC_gemma)/chat_template.jinja
	mkdir -p $(THREE_SCORES)
	$(if $(wildcard $(KEPT)/gsm8k-three/$(1)-$(2)),cp -r $(KEPT)/gsm8k-three/$(1)-$(2) $(THREE_SCORES)/)
	$(COLLM) score $(DATA)/gsm8k/$(2).jsonl $(AMONG_$(1)) --max-length 512 --dtype bfloat16 --out $(THREE_SCORES)/$(1)-$(2)
$(THREE)/collm.json: | $(THREE_SCORES)/$(1)-$(2)/scores.json
endef
$(foreach name,base half gemma,$(foreach part,look-train calibration,$(eval $(call three_scores,$(name),$(part)))))
# $(1): a name, $(2): whose scores
three_assistant = {name: $(1)$(comma) model: $(SPEC_$(2))$(comma) dtype: bfloat16$(comma) \
    scores: $(THREE_SCORES)/$(2)-look-train$(comma) validation_scores: $(THREE_SCORES)/$(2)-calibration}
$(THREE)/collm.json:
	$(COLLM) train recipes/families/gate.yaml out=$(THREE) base.model=$(MODEL) \
	    data.train=$(LOOK)-train.jsonl data.validation=$(LOOK)-validation.jsonl \
	    base.scores=$(THREE_SCORES)/base-look-train base.validation_scores=$(THREE_SCORES)/base-calibration \
	    'assistants=[$(call three_assistant,qwen,half)$(comma) $(call three_assistant,gemma,gemma)]'
$(THREE)-oracle.json: | $(THREE)/collm.json
	$(COLLM) oracle $(THREE) --data $(LOOK)-test.jsonl --dtype bfloat16 --rates 0.05,0.1,0.2,0.4,0.6 \
	    --out $(THREE)-oracle.jsonl
look-gemma: $(THREE)-oracle.json
	$(PYTHON) recipes/families/gold.py --base $(THREE_SCORES)/base-calibration \
	    --assistant $(THREE_SCORES)/half-calibration --assistant $(THREE_SCORES)/gemma-calibration \
	    --reading $(THREE)-oracle.jsonl --data $(LOOK)-test.jsonl --rate 0.1 --rate 0.2 --rate 0.4
	$(PYTHON) recipes/families/paired.py $(THREE)-oracle.jsonl

# The smallest part with a tuned base: tuned on the form of 300 answers; a gate over it, learnt from 200 problems that it was
# not tuned on, with the assistant's scores that are kept. Judged on gold text of 40 of the calibration part, and on texts
# of the first 50 of the test part, opened once for all of these systems. The gate as it was trained (0.5), chance at the
# rate that it had on calibration texts, entropy at a value that 20 % of the gold chunks exceed: nothing is chosen by quality.
SMALL := $(RUNS)/small/gsm8k
SMALL_TESTED ?= 50
SMALL_BATCH ?= 60
SMALL_WRITE := --task gsm8k_flexible --batch-size $(SMALL_BATCH) --dtype bfloat16 --device $(DEVICE)
SMALL_RANDOM ?= 0.15
SMALL_ENTROPY ?= 1.9
PAIR_SMALL := $(SMALL)/gate
$(LOOK)-small.jsonl: | $(LOOK)-test.jsonl
	head -n 300 $(DATA)/gsm8k/train.jsonl > $(DATA)/gsm8k/train-300.jsonl
	head -n 40 $(DATA)/gsm8k/calibration.jsonl > $(DATA)/gsm8k/calibration-40.jsonl
	head -n $(SMALL_TESTED) $(DATA)/gsm8k/test.jsonl > $@.tmp
	mv $@.tmp $@
$(SMALL)/sft/collm.json: | $(LOOK)-small.jsonl
	$(COLLM) train recipes/families/sft.yaml out=$(SMALL)/sft cache=$(RUNS)/small/cache \
	    data.train=$(DATA)/gsm8k/train-300.jsonl data.validation=$(DATA)/gsm8k/calibration-40.jsonl \
	    base.dtype=bfloat16 training.epochs=1 training.batch_size=8 training.gradient_accumulation=1 \
	    training.learning_rate=5.0e-4 training.evaluations=2
# $(1): a part
define small_scores
$(SMALL)/scores/$(1)/scores.json: | $(LOOK)-small.jsonl $(SMALL)/sft/collm.json $(SPEC_half)/config.json
	$(COLLM) score $(LOOK)-$(1).jsonl --model $(SMALL)/sft --with $(SPEC_half) --max-length 512 --dtype bfloat16 \
	    --out $(SMALL)/scores/$(1)
$(PAIR_SMALL)/collm.json: | $(SMALL)/scores/$(1)/scores.json
endef
$(foreach part,train validation,$(eval $(call small_scores,$(part))))
SMALL_QWEN := assistants=[{name: qwen, model: $(SPEC_half), dtype: bfloat16, scores: $(KEPT)/gsm8k/half-look-train, \
    validation_scores: $(KEPT)/gsm8k/half-calibration}]
$(PAIR_SMALL)/collm.json:
	$(COLLM) train recipes/families/gate.yaml out=$(PAIR_SMALL) cache=$(RUNS)/small/cache base.model=$(SMALL)/sft \
	    base.scores=$(SMALL)/scores/train base.validation_scores=$(SMALL)/scores/validation \
	    '$(SMALL_QWEN)'
# Base and gate together: on the 300 answers that the base alone was tuned on, in as many steps.
TOGETHER := $(SMALL)/together
$(SMALL)/scores/half-train-300/scores.json: | $(LOOK)-small.jsonl $(SPEC_half)/config.json
	mkdir -p $(SMALL)/scores
	$(if $(wildcard $(KEPT)/gsm8k/half-train-300),cp -r $(KEPT)/gsm8k/half-train-300 $(SMALL)/scores/)
	$(COLLM) score $(DATA)/gsm8k/train-300.jsonl --model $(SPEC_half) --base $(MODEL) --max-length 512 --dtype bfloat16 \
	    --out $(SMALL)/scores/half-train-300
$(TOGETHER)/collm.json: | $(SMALL)/scores/half-train-300/scores.json
	$(COLLM) train recipes/families/pair.yaml out=$(TOGETHER) cache=$(RUNS)/small/cache \
	    data.train=$(DATA)/gsm8k/train-300.jsonl data.validation=$(LOOK)-validation.jsonl \
	    base.dtype=bfloat16 training.epochs=1 training.batch_size=8 training.gradient_accumulation=1 \
	    training.learning_rate=5.0e-4 training.evaluations=2 \
	    '$(subst $(KEPT)/gsm8k/half-look-train,$(SMALL)/scores/half-train-300,$(SMALL_QWEN))'
# $(1): a system's name, $(2): what must be there, $(3): checkpoint and options, $(4): how long answers may become
define small_system
SMALL_SYSTEMS += $(1)
$(call small_text,$(1),$(2),$(3),$(4))
endef
define small_text
$(SMALL)/test/$(1).json: | $(2) $(LOOK)-small.jsonl
	$(COLLM) eval $(3) $(SMALL_WRITE) --max-tokens $(4) --data $(LOOK)-small.jsonl --name $(1) --out $(SMALL)/test/$(1).jsonl
endef
$(eval $(call small_system,sft,$(SMALL)/sft/collm.json,$(SMALL)/sft,200))
$(eval $(call small_system,half,$(SPEC_half)/config.json,$(SPEC_half),400))
$(eval $(call small_system,gate,$(PAIR_SMALL)/collm.json,$(PAIR_SMALL) --method threshold --threshold 0.5,200))
$(eval $(call small_system,random,$(PAIR_SMALL)/collm.json,$(PAIR_SMALL) --method random --threshold $(SMALL_RANDOM),200))
$(eval $(call small_system,entropy,$(PAIR_SMALL)/collm.json,$(PAIR_SMALL) --method entropy --threshold $(SMALL_ENTROPY),200))
$(eval $(call small_system,nudging,$(SMALL)/sft/collm.json,$(SMALL)/sft --assistant qwen=$(SPEC_half) --method nudging,400))
$(eval $(call small_system,base,$(SPEC_half)/config.json,$(MODEL),200))
# On gold text: who is right where, and what the gate, doubt and chance would choose.
small: $(SMALL)/oracle.json
$(SMALL)/oracle.json: | $(PAIR_SMALL)/collm.json
	$(COLLM) oracle $(PAIR_SMALL) --data $(LOOK)-test.jsonl --limit 40 --dtype bfloat16 --rates 0.1,0.2,0.4 \
	    --out $(SMALL)/oracle.jsonl
	$(PYTHON) recipes/families/paired.py $(SMALL)/oracle.jsonl
small: $(SMALL)/test/report.html
$(SMALL)/test/report.html: | $(SMALL_SYSTEMS:%=$(SMALL)/test/%.json)
	$(COLLM) compare $(SMALL_SYSTEMS:%=$(SMALL)/test/%.json) --against gate
	$(COLLM) report $(SMALL_SYSTEMS:%=$(SMALL)/test/%.json) --against gate \
	    --title "SmolLM2-135M beside Qwen2.5-Coder-0.5B: GSM8K" --out $(SMALL)/test/report.html

# Base and gate together on gold text and in texts, and the gate over the tuned base at other rates, beside chance and its
# own doubt. Thresholds are of 16 of the calibration part that nothing else here has read.
SMALL_RATES ?= 10 20 40
$(LOOK)-tried.jsonl: | $(LOOK)-test.jsonl
	tail -n +41 $(LOOK)-test.jsonl | head -n 16 > $@.tmp
	mv $@.tmp $@
# $(1): a name, $(2): a pair's folder, $(3): a signal
define small_tried
$(SMALL)/tried/$(1)/curve.csv: | $(2)/collm.json $(LOOK)-tried.jsonl
	$(COLLM) calibrate $(2) $(SMALL_WRITE) --max-tokens 200 --data $(LOOK)-tried.jsonl --signal $(3) --rates 0.1,0.2,0.4 \
	    --rounds 2 --out $(SMALL)/tried/$(1)
$(foreach rate,$(SMALL_RATES),
SMALL_AT += $(1)_$(rate)
$(call small_text,$(1)_$(rate),$(SMALL)/tried/$(1)/curve.csv,$(2) --method $(METHOD_$(3)) --deferral-rate 0.$(rate),200))
endef
$(eval $(call small_tried,gate,$(PAIR_SMALL),gate))
$(eval $(call small_tried,entropy,$(PAIR_SMALL),entropy))
$(eval $(call small_tried,together,$(TOGETHER),gate))
$(foreach rate,$(SMALL_RATES),$(eval SMALL_AT += random_$(rate))$(eval $(call small_text,random_$(rate),\
    $(PAIR_SMALL)/collm.json,$(PAIR_SMALL) --method random --threshold 0.$(rate),200)))
small-pair: $(SMALL)/together-oracle.json $(SMALL)/test/rates.html
$(SMALL)/together-oracle.json: | $(TOGETHER)/collm.json $(SMALL)/oracle.json
	$(COLLM) oracle $(TOGETHER) --data $(LOOK)-test.jsonl --limit 40 --dtype bfloat16 --rates 0.1,0.2,0.4 \
	    --out $(SMALL)/together-oracle.jsonl
	$(PYTHON) recipes/families/paired.py $(SMALL)/together-oracle.jsonl --beside $(SMALL)/oracle.jsonl
$(SMALL)/test/rates.html: | $(SMALL_AT:%=$(SMALL)/test/%.json) $(SMALL)/test/sft.json $(SMALL)/test/half.json
	$(COLLM) compare $(SMALL_AT:%=$(SMALL)/test/%.json) $(SMALL)/test/sft.json $(SMALL)/test/half.json --against together_20
	$(COLLM) report $(SMALL_AT:%=$(SMALL)/test/%.json) $(SMALL)/test/sft.json $(SMALL)/test/half.json --against together_20 \
	    --title "SmolLM2-135M beside Qwen2.5-Coder-0.5B at three rates: GSM8K" --out $(SMALL)/test/rates.html

# Code: the gate of `look-mbpp`, over the base as it was published, in texts of the first 50 of MBPP's test part, opened once
# for all of these. Every fifth chunk or so to Qwen: by the gate and by the base's entropy, with thresholds of 16 problems of
# the calibration part that neither the gate's training nor the choice of its epoch has read; at random; and nudging, which
# needs no gate and no tuned base. The limit holds for all, and is beyond every gold answer.
CODE := $(RUNS)/small/mbpp
CODE_PAIR := $(RUNS)/mbpp/look-half
CODE_TESTED ?= 50
CODE_LONG ?= 300
CODE_WRITE = --task mbpp --batch-size $(SMALL_BATCH) --max-tokens $(CODE_LONG) --dtype bfloat16 --device $(DEVICE)
$(DATA)/mbpp/small.jsonl: | $(DATA)/mbpp/look-test.jsonl
	tail -n 16 $(DATA)/mbpp/calibration.jsonl > $(DATA)/mbpp/tried.jsonl
	head -n $(CODE_TESTED) $(DATA)/mbpp/test.jsonl > $@.tmp
	mv $@.tmp $@
# $(1): a signal
define code_tried
$(CODE)/tried/$(1)/curve.csv: | $(CODE_PAIR)/collm.json $(DATA)/mbpp/small.jsonl
	$(COLLM) calibrate $(CODE_PAIR) $(CODE_WRITE) --data $(DATA)/mbpp/tried.jsonl --signal $(1) --rates 0.2 --rounds 2 \
	    --out $(CODE)/tried/$(1)
$(call code_system,$(1)_20,$(CODE)/tried/$(1)/curve.csv,$(CODE_PAIR) --method $(METHOD_$(1)) --deferral-rate 0.20)
endef
# $(1): a system's name, $(2): what must be there, $(3): checkpoint and options
define code_system
CODE_SYSTEMS += $(1)
$(CODE)/test/$(1).json: | $(2) $(DATA)/mbpp/small.jsonl
	$(COLLM) eval $(3) $(CODE_WRITE) --data $(DATA)/mbpp/small.jsonl --name $(1) --out $(CODE)/test/$(1).jsonl
endef
$(eval $(call code_system,base,,$(MODEL)))
$(eval $(call code_system,half,$(SPEC_half)/config.json,$(SPEC_half)))
$(foreach signal,gate entropy,$(eval $(call code_tried,$(signal))))
$(eval $(call code_system,random_20,$(CODE_PAIR)/collm.json,$(CODE_PAIR) --method random --threshold 0.20))
$(eval $(call code_system,nudging,$(SPEC_half)/config.json,$(MODEL) --assistant qwen=$(SPEC_half) --method nudging))
small-mbpp: $(CODE)/test/report.html
$(CODE)/test/report.html: | $(CODE_SYSTEMS:%=$(CODE)/test/%.json)
	$(COLLM) compare $(CODE_SYSTEMS:%=$(CODE)/test/%.json) --against gate_20
	$(COLLM) report $(CODE_SYSTEMS:%=$(CODE)/test/%.json) --against gate_20 \
	    --title "SmolLM2-135M beside Qwen2.5-Coder-0.5B: MBPP" --out $(CODE)/test/report.html

# In what pieces the models can take turns. $(1): a task, $(2): an assistant
define cuts_of
cuts: $(RUNS)/$(1)/cuts-$(2).json
$(RUNS)/$(1)/cuts-$(2).json: | $(DATA)/$(1)/train.jsonl $(HAVE)
	mkdir -p $(RUNS)/$(1)
	$(COLLM) pair-info $(MODEL) $(SPEC_$(2)) --data $(DATA)/$(1)/train.jsonl --json > $(RUNS)/$(1)/cuts-$(2).tmp
	mv $(RUNS)/$(1)/cuts-$(2).tmp $(RUNS)/$(1)/cuts-$(2).json
endef
$(foreach task,$(TASKS),$(foreach name,$(ASSISTANTS),$(eval $(call cuts_of,$(task),$(name)))))

PATHS = cache=$(RUNS)/cache data.train=$(DATA)/$(1)/train.jsonl data.validation=$(DATA)/$(1)/calibration.jsonl
# $(1): a task, $(2): an assistant. Scores are made on the way, and kept in the cache.
define models_of
train: $(RUNS)/$(1)/pair-$(2)/collm.json
$(RUNS)/$(1)/pair-$(2)/collm.json: | $(DATA)/$(1)/train.jsonl $(HAVE)
	$(COLLM) train recipes/families/pair.yaml out=$(RUNS)/$(1)/pair-$(2) $(PATHS) \
	    'assistants=[{name: qwen$(comma) model: $(SPEC_$(2))$(comma) dtype: bfloat16}]'
oracle: $(RUNS)/$(1)/oracle/pair-$(2).json
$(RUNS)/$(1)/oracle/pair-$(2).json: | $(RUNS)/$(1)/pair-$(2)/collm.json
	$(COLLM) oracle $(RUNS)/$(1)/pair-$(2) --data $(DATA)/$(1)/calibration.jsonl --limit $(TRIED) --dtype $(DTYPE) \
	    --device $(DEVICE) --out $(RUNS)/$(1)/oracle/pair-$(2).jsonl
endef
# $(1): a task
define sft_of
train: $(RUNS)/$(1)/sft/collm.json
$(RUNS)/$(1)/sft/collm.json: | $(DATA)/$(1)/train.jsonl
	$(COLLM) train recipes/families/sft.yaml out=$(RUNS)/$(1)/sft $(PATHS)
endef
$(foreach task,$(TASKS),$(eval $(call sft_of,$(task)))$(foreach name,$(ASSISTANTS),$(eval $(call models_of,$(task),$(name)))))

# Thresholds for fixed rates; nothing is chosen by quality. $(1): a task, $(2): an assistant, $(3): a signal
define calibration
calibrate: $(RUNS)/$(1)/thresholds/$(2)-$(3)/curve.csv
$(RUNS)/$(1)/thresholds/$(2)-$(3)/curve.csv: | $(RUNS)/$(1)/pair-$(2)/collm.json
	$(COLLM) calibrate $(RUNS)/$(1)/pair-$(2) $(call WRITE,$(1)) --data $(DATA)/$(1)/calibration.jsonl --limit $(TRIED) \
	    --signal $(3) --rates 0.1,0.2,0.4 --rounds 3 --out $(RUNS)/$(1)/thresholds/$(2)-$(3)
endef
$(foreach task,$(TASKS),$(foreach name,$(ASSISTANTS),$(foreach signal,$(SIGNALS),\
    $(eval $(call calibration,$(task),$(name),$(signal))))))

# The one look at the test parts. $(1): a task, $(2): a system's name, $(3): what must be there, $(4): checkpoint and options
define system
SYSTEMS_$(1) += $(2)
$(RUNS)/$(1)/test/$(2).json: | $(3) $(DATA)/$(1)/train.jsonl
	$(COLLM) eval $(4) $(call WRITE,$(1)) --data $(DATA)/$(1)/test.jsonl --limit $(TESTED) --name $(2) \
	    --out $(RUNS)/$(1)/test/$(2).jsonl
endef
# $(1): a task, $(2): an assistant
define of_assistant
$(call system,$(1),$(2),$(HAVE),$(SPEC_$(2)))
$(call system,$(1),$(2)-nudging,$(RUNS)/$(1)/sft/collm.json,$(RUNS)/$(1)/sft --assistant qwen=$(SPEC_$(2)) --method nudging)
$(foreach rate,$(RATES),
$(call system,$(1),$(2)-random_$(rate),$(RUNS)/$(1)/pair-$(2)/collm.json,$(RUNS)/$(1)/pair-$(2) --method random --deferral-rate 0.$(rate))
$(foreach signal,$(SIGNALS),
$(call system,$(1),$(2)-$(signal)_$(rate),$(RUNS)/$(1)/thresholds/$(2)-$(signal)/curve.csv,$(RUNS)/$(1)/pair-$(2) --method $(METHOD_$(signal)) --deferral-rate 0.$(rate))))
endef
$(foreach task,$(TASKS),$(eval $(call system,$(task),sft,$(RUNS)/$(task)/sft/collm.json,$(RUNS)/$(task)/sft))\
    $(foreach name,$(ASSISTANTS),$(eval $(call of_assistant,$(task),$(name)))))

# Paired exact tests, Holm over each table.
define compared
test: $(RUNS)/$(1)/test/report.html
$(RUNS)/$(1)/test/report.html: | $(SYSTEMS_$(1):%=$(RUNS)/$(1)/test/%.json)
	$(COLLM) compare $(SYSTEMS_$(1):%=$(RUNS)/$(1)/test/%.json) --against half-gate_20
	$(COLLM) report $(SYSTEMS_$(1):%=$(RUNS)/$(1)/test/%.json) --against half-gate_20 \
	    --title "SmolLM2-135M beside Qwen2.5-Coder: $(1)" --out $(RUNS)/$(1)/test/report.html
endef
$(foreach task,$(TASKS),$(eval $(call compared,$(task))))
