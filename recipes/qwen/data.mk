# The parts of GSM8K and MBPP in $(DATA), alike in recipes/qwen and recipes/families, so that the two studies compare.
# GSM8K as in recipes/gsm8k: train and calibration of its first 1,400 problems. The test part here is of later ones, which
# no study has opened; GSM8K's own is not used.
$(DATA)/gsm8k/train.jsonl:
	$(call want,GSM8K)
	mkdir -p $(DATA)/gsm8k
	head -n 1400 $(GSM8K) > $(DATA)/gsm8k-first.jsonl
	tail -n +1701 $(GSM8K) | head -n 1000 > $(DATA)/gsm8k-later.jsonl
	$(COLLM) prepare gsm8k $(DATA)/gsm8k-later.jsonl --out $(DATA)/gsm8k --parts test
	$(COLLM) prepare gsm8k $(DATA)/gsm8k-first.jsonl --out $(DATA)/gsm8k --parts train=0.7,calibration=0.1,spent=0.2

# MBPP by its authors' parts: train, validation, test.
$(DATA)/mbpp/train.jsonl:
	$(call want,MBPP)
	$(COLLM) prepare mbpp $(MBPP) --out $(DATA)/mbpp-all
	mkdir -p $(DATA)/mbpp
	cp $(DATA)/mbpp-all/validation.jsonl $(DATA)/mbpp/calibration.jsonl
	cp $(DATA)/mbpp-all/test.jsonl $(DATA)/mbpp
	cp $(DATA)/mbpp-all/train.jsonl $@.tmp
	mv $@.tmp $@
