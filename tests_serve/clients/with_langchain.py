"""What LangChain's OpenAI chat model makes of a server, as one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai import BadRequestError

USER = [HumanMessage("How many apples?")]


def model(**settings: object) -> ChatOpenAI:
    return ChatOpenAI(base_url=sys.argv[1], api_key="none", model="pair", max_tokens=24, seed=7, **settings)


def tool(city: str) -> str:
    """The weather of a city."""
    return city


def refused() -> str:
    try:
        model(temperature=0).bind_tools([tool]).invoke(USER)
    except BadRequestError as error:
        return str(error)
    raise SystemExit("tools were not refused")


greedy = model(temperature=0)
whole = greedy.invoke(USER)
chunks = list(model(temperature=0, stream_usage=True).stream(USER))
turns = [SystemMessage("Be brief."), *USER, AIMessage("Two."), HumanMessage("And pears?")]
who = model(temperature=0, extra_body={"collm": {"threshold": 0.3, "tokens": True}}).invoke(USER)


async def asynchronous() -> list[str]:
    return [str(found.content) for found in await greedy.abatch([USER] * 4)]


print(
    json.dumps(
        {
            "whole": whole.content,
            "usage": whole.usage_metadata["output_tokens"],
            "finish_reason": whole.response_metadata["finish_reason"],
            "streamed": "".join(str(chunk.content) for chunk in chunks),
            "streamed_usage": sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks),
            "turns": greedy.invoke(turns).content,
            "sampled": model(temperature=0.8).invoke(USER).content,
            "who": who.content,
            "asynchronous": asyncio.run(asynchronous()),
            "refused": refused(),
        }
    )
)
