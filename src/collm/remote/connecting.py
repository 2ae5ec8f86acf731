"""A server is asked, before anything else, whether it is what it is taken for."""

from __future__ import annotations

import httpx
from transformers import PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.models.served import ServedInfo
from collm.models.specs import server_name
from collm.models.tokenizers import PROBES, shared_vocab_size
from collm.remote.address import Address
from collm.remote.background import background
from collm.remote.client import Client
from collm.remote.faults import ServerFault
from collm.remote.model import RemoteModel
from collm.remote.wire import Completion, Token

DEFER = "<|defer|>"


def connect(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str | None = None,
    served: ServedInfo | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
    vocab_size: int | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> RemoteModel:
    """A model behind a server, once it has been found to be what it should be.

    Args:
        tokenizer: which the server's must equal, token for token, on texts that tell tokenizers apart.
        served: of an export, whose server must then decide about deferrals.
        eos_token_ids: that end its texts, besides the tokenizer's.
        vocab_size: tokens that the base knows; others are faults.
        transport: instead of the network.

    Raises:
        CollmError: no such server or model, another tokenizer, or a server that does not do what is needed.
    """
    address = Address.parse(spec)
    if served is not None:
        vocab_size = served.vocab_size
    ends = eos_token_ids
    if isinstance(tokenizer.eos_token_id, int):
        ends |= {tokenizer.eos_token_id}

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    async def probed() -> RemoteModel:
        client = Client(address, transport=transport)
        try:
            card = await client.card()
            await client.compare_tokenizer(encode, PROBES)
            model = RemoteModel(
                client,
                card,
                await client.version(),
                tokenizer,
                name=name or server_name(spec),
                served=served,
                eos_token_ids=ends,
                vocab_size=vocab_size or shared_vocab_size(tokenizer),
            )
            if served is not None:
                await _require_deciding(model, served)
            return model
        except BaseException:
            await client.__aexit__(None, None, None)
            raise

    return background.wait(probed())


def require_plain(model: RemoteModel) -> None:
    """Refuse to score by an export, whose log-probabilities are shared with the rows of the gate.

    Raises:
        CollmError: it is one.
    """
    if len(background.wait(model.client.tokenize(DEFER))) == 1:
        raise CollmError(
            f"{model.name} is an export ({DEFER} is one of its tokens): among its log-probabilities are those of the "
            "gate; score by a server of the plain model"
        )


async def _require_deciding(model: RemoteModel, served: ServedInfo) -> None:
    """Refuse a server that would not stop where the base defers, on any replica.

    Raises:
        ServerFault: what it does instead.
    """
    client = model.client
    if not client.dialect.plugin:
        raise ServerFault(
            f"a base with a gate needs a vLLM that runs collm's plugin (vllm+http://..., started by collm vllm-serve), "
            f"not {client.address.kind}"
        )
    watch = (*served.defer_token_ids, served.zero_token_id)
    for replica in client.replicas.all:
        for mode, defers in (("always", True), ("never", False)):
            settings = {"collm_deferral": mode}
            asked = Completion([0], 1, stop_ids=watch[:-1], watch=watch, settings=settings)
            try:
                tokens = [event async for event in client.complete(asked, only=replica) if isinstance(event, Token)]
            except ServerFault as fault:
                raise ServerFault(f"{fault}. Does it serve this export, and by collm vllm-serve?") from fault
            wrote = tokens[0].token_id if tokens else None
            if (wrote in served.defer_token_ids) != defers or (not defers and (wrote or 0) >= served.vocab_size):
                raise ServerFault(
                    f"{replica.url}: asked {'to defer at once' if defers else 'never to defer'}, the server wrote "
                    f"token {wrote}: it does not run collm's logits processor, or serves another export; start it by "
                    "collm vllm-serve"
                )
