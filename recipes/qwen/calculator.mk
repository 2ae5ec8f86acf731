# Two assistants on GSM8K: the large model and a calculator, which costs nothing and is silent where it knows nothing. The
# calculator alone is asked at every token, without a gate; the two together by a gate that gold text taught, and by entropy
# (to whom of them is then the gate's affair).
#
#     make -f recipes/qwen/study.mk calculator GSM8K=train.jsonl
BOTH := $(RUNS)/gsm8k/both
.PHONY: calculator
$(foreach part,train calibration,$(foreach model,large base,\
    $(eval $(BOTH)/collm.json: | $(RUNS)/scores/gsm8k/$(model)-$(part)/scores.json)))
$(BOTH)/collm.json:
	$(COLLM) train recipes/qwen/gate.yaml $(call CHANGES,gsm8k,both) $(call BASE_SCORES,gsm8k) \
	    'assistants=[$(call SCORED_LARGE,gsm8k)$(comma) {name: calculator$(comma) model: calculator}]'
$(eval $(call tested,gsm8k,calculator,$(HAVE),$(BASE) --assistant calculator --method always))
# $(1): a signal
define both_by
$(call calibrated,gsm8k,both,$(1),0.2)
$(call tested,gsm8k,both-$(1)_20,$(RUNS)/gsm8k/thresholds/both-$(1)/curve.csv,$(BOTH) --method $(METHOD_$(1)) --deferral-rate 0.20)
endef
$(foreach signal,gate entropy,$(eval $(call both_by,$(signal))))

WITH_TOOL := small large calculator gate-gate_20 gate-entropy_20 both-gate_20 both-entropy_20
calculator: $(RUNS)/gsm8k/calculator.html
$(RUNS)/gsm8k/calculator.html: | $(WITH_TOOL:%=$(RUNS)/gsm8k/test/%.json)
	$(COLLM) compare $(WITH_TOOL:%=$(RUNS)/gsm8k/test/%.json) --against calculator
	$(COLLM) report $(WITH_TOOL:%=$(RUNS)/gsm8k/test/%.json) --against calculator \
	    --title "Qwen2.5-Coder and a calculator (Q4_K_M): GSM8K" --out $(RUNS)/gsm8k/calculator.html
