# The gate alone, taught by texts that the models write themselves, on MBPP: the base's right ones, the large model's, the
# pair's (who writes drawn from the gate that gold text taught, then the token from that one's law: exactly the marginal),
# as many of each; and gold text with the pair's behind it. If the pair's own do not beat the other two, it is distillation.
#
#     make -f recipes/qwen/study.mk own MBPP=mbpp.jsonl
OWN := $(RUNS)/mbpp/own
OWN_DATA := $(DATA)/mbpp-own
WRITERS := base large pair
BY_base := $(BASE)
BY_large := $(LARGE)
BY_pair := $(RUNS)/mbpp/gate --method sampled
.PHONY: own
own: $(OWN)/report.html

$(WRITERS:%=$(OWN)/%.json): $(OWN)/%.json: | $(DATA)/mbpp/train.jsonl $(RUNS)/mbpp/gate/collm.json $(HAVE)
	$(COLLM) eval $(BY_$*) $(call WRITE,mbpp) --data $(DATA)/mbpp/train.jsonl \
	    --temperature 1 --seed 1 --name $* --out $(OWN)/$*.jsonl
$(OWN_DATA)/all-calibration.jsonl: | $(WRITERS:%=$(OWN)/%.json)
	$(PYTHON) recipes/qwen/own_arms.py $(WRITERS:%=$(OWN)/%.jsonl) --data $(DATA)/mbpp/train.jsonl --out $(OWN_DATA)

# `gate` is the one that gold text taught, for more steps than it had gains: it stopped by itself.
ARMS := base large pair gold_pair
# $(1): an arm
define arm
$(RUNS)/mbpp/own-$(1)/collm.json: | $(OWN_DATA)/all-calibration.jsonl $(HAVE)
	$(COLLM) train recipes/qwen/gate.yaml out=$(RUNS)/mbpp/own-$(1) base.model=$(BASE) base.scores=null \
	    base.validation_scores=null 'assistants=[{name: large$(comma) model: $(LARGE)$(comma) dtype: bfloat16}]' \
	    data.train=$(OWN_DATA)/$(1)-train.jsonl data.validation=$(OWN_DATA)/$(1)-calibration.jsonl
$(call calibrated,mbpp,own-$(1),gate,0.2)
$(call tested,mbpp,own-$(1)-gate_20,$(RUNS)/mbpp/thresholds/own-$(1)-gate/curve.csv,$(RUNS)/mbpp/own-$(1) --method threshold --deferral-rate 0.20)
endef
$(foreach one,$(ARMS),$(eval $(call arm,$(one))))

# What each gate makes of right texts to every fifth problem, whoever wrote them: the second figure. `gate` learnt gold
# answers of these problems, the others none.
$(foreach one,$(ARMS:%=own-%) gate,$(OWN)/held-out/$(one).json): $(OWN)/held-out/%.json: | $(RUNS)/mbpp/%/collm.json
	$(COLLM) oracle $(RUNS)/mbpp/$* --data $(OWN_DATA)/all-calibration.jsonl $(MACHINE) --out $(OWN)/held-out/$*.jsonl

COMPARED := small large gate-gate_20 gate-entropy_20 $(ARMS:%=own-%-gate_20)
$(OWN)/report.html: | $(foreach one,$(ARMS:%=own-%) gate,$(OWN)/held-out/$(one).json) $(COMPARED:%=$(RUNS)/mbpp/test/%.json)
	$(COLLM) compare $(COMPARED:%=$(RUNS)/mbpp/test/%.json) --against own-pair-gate_20
	$(COLLM) report $(COMPARED:%=$(RUNS)/mbpp/test/%.json) --against own-pair-gate_20 \
	    --title "Texts of one's own: MBPP" --out $(OWN)/report.html
