"""What LiteLLM makes of a server: texts, streams, usage, log-probabilities and errors, as one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys

import litellm

litellm.telemetry = False
litellm.suppress_debug_info = True
USER = [{"role": "user", "content": "How many apples?"}]
COMMON = {"model": "openai/pair", "api_base": sys.argv[1], "api_key": "none", "max_tokens": 24, "seed": 7}


async def asynchronous() -> list[str]:
    asked = [litellm.acompletion(messages=USER, **{**COMMON, "seed": seed}) for seed in range(4)]
    return [found.choices[0].message.content for found in await asyncio.gather(*asked)]


def refused() -> str:
    try:
        litellm.completion(messages=USER, **{**COMMON, "model": "openai/nobody"})
    except litellm.NotFoundError as error:
        return str(error)
    raise SystemExit("an unknown model was not refused")


whole = litellm.completion(messages=USER, logprobs=True, top_logprobs=2, **COMMON)
chunks = list(litellm.completion(messages=USER, stream=True, stream_options={"include_usage": True}, **COMMON))
several = litellm.completion(messages=USER, n=2, **COMMON)
text = litellm.text_completion(prompt="Paris is the", **{**COMMON, "model": "text-completion-openai/pair"})
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "finish_reason": whole.choices[0].finish_reason,
            "usage": whole.usage.completion_tokens,
            "logprobs": len(whole.choices[0].logprobs.content),
            "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
            "streamed_usage": [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)],
            "several": [choice.message.content for choice in several.choices],
            "text": text.choices[0].text,
            "asynchronous": asyncio.run(asynchronous()),
            "refused": refused(),
        }
    )
)
