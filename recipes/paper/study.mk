# The paper's own experiments: Llama-2 with larger Llamas, Llemma and Meditron; README.md tells what they need.
#
#     make -f recipes/paper/study.mk NAME=gsm8k_7b_llemma7b SOURCE=train.jsonl TEST=test.jsonl    # from the root
#
# NAME is DATA_BASE_ASSISTANT; other models are BASE=SPEC ASSISTANT=SPEC, which makes a rehearsal with tiny ones, too.
# A target is the file that its step makes. Prerequisites are order-only: what is there is not made anew, and a stopped
# step goes on where it was.
NAME ?= gsm8k_7b_llemma7b
PYTHON ?= .venv/bin/python
# GPUs that train; 1 is a plain process.
GPUS ?= 1
STUDY := recipes/paper
WORDS := $(subst _, ,$(NAME))
KIND := $(firstword $(WORDS))

HUB_7b := meta-llama/Llama-2-7b-hf
HUB_13b := meta-llama/Llama-2-13b-hf
HUB_70b := meta-llama/Llama-2-70b-hf
HUB_llemma7b := EleutherAI/llemma_7b
HUB_llemma34b := EleutherAI/llemma_34b
HUB_meditron7b := epfl-llm/meditron-7b
HUB_meditron70b := epfl-llm/meditron-70b
BASE ?= $(HUB_$(word 2,$(WORDS)))
ASSISTANT ?= $(HUB_$(word 3,$(WORDS)))
ifeq ($(and $(BASE),$(ASSISTANT),$(wildcard $(STUDY)/$(KIND).yaml)),)
$(error NAME is DATA_BASE_ASSISTANT, as in gsm8k_7b_llemma7b, not $(NAME): DATA is tulu, gsm8k, math or bioasq, models are \
    $(patsubst HUB_%,%,$(sort $(filter HUB_%,$(.VARIABLES)))))
endif
ifeq ($(notdir $(BASE)),$(notdir $(ASSISTANT)))
$(error BASE and ASSISTANT are both called $(notdir $(BASE)): their folders need different names)
endif

ifeq ($(filter $(GPUS),1 2 4 8 16 32),)
$(error GPUS is 1, 2, 4, 8, 16 or 32, not $(GPUS): a step takes 128 examples in batches of 4)
endif

# Published files: what is trained and calibrated on, and what is tested on (for tulu: AlpacaEval's questions).
SOURCE ?= $(KIND)_source
TEST ?= $(KIND)_test
PARTS ?= $(if $(filter tulu,$(KIND)),$(PARTS_tulu),$(PARTS_others))
PARTS_tulu := train=0.995,calibration=0.005
PARTS_others := train=0.92,calibration=0.08
DATA ?= data/paper
RUNS ?= runs/paper

# DEVICE writes and scores; an assistant may have one of its own.
DEVICE ?= cuda
ASSISTANT_DEVICE ?= $(DEVICE)
DTYPE ?= bfloat16
# 128 examples a step, in batches of 4. SETTINGS: more keys of the recipe, as in training.seed=1.
SETTINGS ?=
STEP = training.batch_size=4 training.gradient_accumulation=$(shell expr 32 / $(GPUS))
LENGTH ?= 1024
MAX_TOKENS ?= 512
BATCH ?= 32
RATES ?= 0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1
ROUNDS ?= 2

COLLM := $(PYTHON) -m collm
LAUNCH := $(PYTHON) -m accelerate.commands.launch --config_file $(STUDY)/zero2.yml --num_processes $(GPUS) -m collm
TRAIN := $(if $(filter 1,$(GPUS)),$(COLLM),$(LAUNCH)) train

# What is compared: see below. LoRA beside 70B in bfloat16 fits no GPU, and collm train has no NF4.
SYSTEMS ?= pair untouched tuned assistant $(if $(filter %70b,$(NAME)),,assistant_tuned) weak random \
    $(if $(filter tulu,$(KIND)),,entropy) confident mixture contrastive proxy_tuning

B := $(RUNS)/models/$(notdir $(BASE))
A := $(RUNS)/models/$(notdir $(ASSISTANT))
ROWS := $(DATA)/$(KIND)
SCORES := $(RUNS)/scores/$(KIND)
OUT := $(RUNS)/$(NAME)
# What does not depend on the pair is shared by the pairs.
SFT := $(RUNS)/sft/$(KIND)_$(notdir $(BASE))
LORA := $(RUNS)/lora/$(KIND)_$(notdir $(ASSISTANT))
TASKS := $(if $(filter bioasq,$(KIND)),$(addprefix bioasq_,factoid list yesno summary),$(KIND))

.NOTPARALLEL:
.PHONY: all help data models score train calibrate test
all: $(if $(filter tulu,$(KIND)),answers,test)

help:
	@echo "make -f $(STUDY)/study.mk [data|models|score|train|calibrate|test|answers] NAME=DATA_BASE_ASSISTANT \\"
	@echo "    SOURCE=PATH TEST=PATH [GPUS=8] [DEVICE=cuda:0] [ASSISTANT_DEVICE=cuda:1]"
	@echo "DATA: tulu gsm8k math bioasq; models: $(patsubst HUB_%,%,$(sort $(filter HUB_%,$(.VARIABLES))))"

# -- data: thresholds and checkpoints are chosen on a part of the training data, never on the test data ----------------

MADE := $(ROWS)/train.jsonl $(if $(filter tulu,$(KIND)),,$(ROWS)/test.jsonl)
data: $(MADE)

$(ROWS)/train.jsonl:
	$(COLLM) prepare $(KIND) $(SOURCE) --out $(ROWS) --parts $(PARTS)

$(ROWS)/test.jsonl: | $(ROWS)/train.jsonl
	$(COLLM) prepare $(KIND) $(TEST) --out $(ROWS) --parts test

# -- models, with the base's tokenizer and one chat template -----------------------------------------------------------

models: $(B)/config.json $(A)/config.json

$(B)/config.json:
	$(PYTHON) $(STUDY)/adopt.py $(BASE) --tokenizer $(BASE) --chat-template $(STUDY)/tulu.jinja --out $(B)

$(A)/config.json:
	$(PYTHON) $(STUDY)/adopt.py $(ASSISTANT) --tokenizer $(BASE) --chat-template $(STUDY)/tulu.jinja --out $(A)

# -- scores of the training text, once for each model, on one process --------------------------------------------------

PARTS_SCORED := train calibration
B_SCORES := $(PARTS_SCORED:%=$(SCORES)/$(notdir $(B))/%/scores.json)
A_SCORES := $(PARTS_SCORED:%=$(SCORES)/$(notdir $(A))/%/scores.json)
score: $(B_SCORES) $(A_SCORES)

$(B_SCORES) $(A_SCORES): $(SCORES)/%/scores.json: | $(MADE) $(B)/config.json $(A)/config.json
	$(COLLM) score $(ROWS)/$(notdir $*).jsonl --model $(RUNS)/models/$(patsubst %/,%,$(dir $*)) --base $(B) \
	    --max-length $(LENGTH) --dtype $(DTYPE) --device $(SCORE_DEVICE) --out $(SCORES)/$*

$(B_SCORES): SCORE_DEVICE = $(DEVICE)
$(A_SCORES): SCORE_DEVICE = $(ASSISTANT_DEVICE)

# -- training: the pair; the base alone; by weak supervision alone; the assistant alone, by LoRA -----------------------

HAS = $(if $(filter $(1),$(SYSTEMS)),$(2))
WEAK := $(call HAS,weak,$(OUT)/weak)
TUNED := $(call HAS,tuned confident mixture contrastive proxy_tuning,$(SFT))
ADAPTED := $(call HAS,assistant_tuned,$(LORA))
TRAINED := $(addsuffix /collm.json,$(OUT)/pair $(WEAK) $(TUNED) $(ADAPTED))
train: $(TRAINED)

SCORED = scores: $(SCORES)/$(1)/train, validation_scores: $(SCORES)/$(1)/calibration
PAIR = 'base={model: $(B), $(call SCORED,$(notdir $(B)))}' \
    'assistants=[{name: $(notdir $(A)), model: $(A), $(call SCORED,$(notdir $(A)))}]'
ALONE = objective=sft assistants=[]
RECIPE = $(STUDY)/$(KIND).yaml data.train=$(ROWS)/train.jsonl \
    data.validation=$(ROWS)/calibration.jsonl data.max_length=$(LENGTH) $(STEP)

$(OUT)/pair/collm.json: CHANGES = $(PAIR)
$(OUT)/weak/collm.json: CHANGES = $(PAIR) objective=weak_supervision
$(SFT)/collm.json: CHANGES = $(ALONE) 'base={model: $(B)}'
# The paper's settings, but for weights in bfloat16 where it has them in NF4.
$(LORA)/collm.json: CHANGES = $(ALONE) 'base={model: $(A), dtype: bfloat16}' tune=lora \
    'lora={r: 64, alpha: 16, dropout: 0.1}' training.learning_rate=1.0e-4

$(OUT)/pair/collm.json $(OUT)/weak/collm.json: | $(B_SCORES) $(A_SCORES)
$(SFT)/collm.json: | $(MADE) $(B)/config.json
$(LORA)/collm.json: | $(MADE) $(A)/config.json
$(TRAINED): %/collm.json:
	$(TRAIN) $(RECIPE) out=$* $(CHANGES) $(SETTINGS)

# One process takes one GPU: transformers would spread its batches over all that it sees.
ifeq ($(GPUS),1)
$(TRAINED): export CUDA_VISIBLE_DEVICES ?= 0
endif

# -- what is compared: checkpoint and options --------------------------------------------------------------------------

HELPED := --assistant '$(notdir $(A))=$(A)?device=$(ASSISTANT_DEVICE)'
pair = $(OUT)/pair $(HELPED) $(call at,pair)
weak = $(OUT)/weak $(HELPED) $(call at,weak)
random = $(OUT)/pair $(HELPED) --method random --deferral-rate $(or $(RATE),0.5)
entropy = $(OUT)/pair $(HELPED) --method entropy --deferral-rate $(RATE) --calibration-task $(TASK)
untouched = $(B)
tuned = $(SFT)
assistant = $(A) --device $(ASSISTANT_DEVICE)
assistant_tuned = $(LORA) --device $(ASSISTANT_DEVICE)
confident = $(SFT) $(HELPED) --method confident
mixture = $(SFT) $(HELPED) --method mixture
contrastive = $(SFT) $(HELPED) --method contrastive
proxy_tuning = $(SFT) $(HELPED) --assistant 'untuned=$(B)' --method proxy_tuning
# They write token by token, so that their costs are exact.
WRITE = --no-speculative --batch-size $(BATCH) --dtype $(DTYPE) --device $(DEVICE) --max-tokens $(MAX_TOKENS)

# -- thresholds, by task: of the gates, then of the base's entropy at the rate that served the pair best ---------------

# The best rate of a curve; 0.5 while there is none (make -n).
best = $(or $(shell sed -n 's/,.*,1$$//p' $(OUT)/calibration/$(1)/$(TASK)/curve.csv 2>/dev/null),0.5)
at = $(if $(TASK),--deferral-rate $(call best,$(1)) --calibration-task $(TASK),--threshold $(THRESHOLD))
part = $(ROWS)/$(if $(filter bioasq,$(KIND)),$(patsubst bioasq_%,%/,$(TASK)))$(1).jsonl
CALIBRATE = $(COLLM) calibrate $(1) $(HELPED) --task $(TASK) --data $(call part,calibration) --rounds $(ROUNDS) \
    --batch-size $(BATCH) --dtype $(DTYPE) --device $(DEVICE) --max-tokens $(MAX_TOKENS)
CURVES := $(foreach task,$(TASKS),pair/$(task) $(call HAS,weak,weak/$(task)) $(call HAS,entropy,pair/$(task)/entropy))
calibrate: $(CURVES:%=$(OUT)/calibration/%/curve.csv)

# $(1): a task
define of_task
$(OUT)/calibration/%/$(1)/curve.csv $(OUT)/calibration/%/$(1)/entropy/curve.csv $(OUT)/test/$(1)/%.json: TASK = $(1)

$(OUT)/calibration/%/$(1)/curve.csv: | $(OUT)/%/collm.json
	$$(call CALIBRATE,$(OUT)/$$*) --rates $$(RATES) --out $(OUT)/calibration/$$*/$(1)

$(OUT)/calibration/%/$(1)/entropy/curve.csv: | $(OUT)/calibration/%/$(1)/curve.csv
	$$(call CALIBRATE,$(OUT)/$$*) --signal entropy --rates $$(call best,$$*) --out $(OUT)/calibration/$$*/$(1)/entropy

$(OUT)/test/$(1)/%.json: RATE = $$(call best,pair)
$(OUT)/test/$(1)/%.json: | train calibrate
	$(COLLM) eval $$(WRITE) $$($$*) --task $(1) --data $$(call part,test) --name $$* --out $(OUT)/test/$(1)/$$*.jsonl

$(OUT)/test/$(1)/report.html: | $(SYSTEMS:%=$(OUT)/test/$(1)/%.json)
	$(COLLM) compare --against pair $(SYSTEMS:%=$(OUT)/test/$(1)/%.json)
	$(COLLM) report $(SYSTEMS:%=$(OUT)/test/$(1)/%.json) --against pair --calibration $(OUT)/pair --out $$@ \
	    --title "$(NAME): $(1)"
endef
$(foreach task,$(filter-out tulu,$(TASKS)),$(eval $(call of_task,$(task))))

# -- the one look at the test data -------------------------------------------------------------------------------------

test: $(TASKS:%=$(OUT)/test/%/report.html)

# Tulu has no gold answers to calibrate with: thresholds are given, and a judge compares their texts.
THRESHOLD ?= 0.5
.PHONY: answers
answers: $(SYSTEMS:%=$(OUT)/answers/%.json)
$(OUT)/answers/%.json: | train
	$(COLLM) answer $(WRITE) $($*) --format alpaca_eval --data $(TEST) --generator $(NAME)_$* --out $@
