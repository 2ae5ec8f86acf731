# The base: vLLM with collm's plugin in it. docker build -f deploy/vllm.Dockerfile -t collm-vllm .
# Not built by CI, which has neither the image nor a GPU.
FROM vllm/vllm-openai:v0.32.0
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
# vLLM's own torch and transformers stay as they are.
RUN python3 -m pip install --quiet --no-deps . && python3 -m pip install --quiet 'httpx>=0.27' 'click>=8.2,<9'
ENTRYPOINT ["python3", "-m", "collm", "vllm-serve"]
