"""Models behind HTTP: token ids in, token ids and log-probabilities out; vLLM, llama.cpp, and what speaks as vLLM does.

`Client.complete` and `Client.score` are all that is asked of a server; retries, time-outs, replicas and the circuit
breaker stand between them and the network. `connecting.connect` makes a model
of it that writes beside those of this process.
"""

from collm.models.specs import is_url
from collm.remote.address import Address
from collm.remote.client import Client
from collm.remote.faults import ServerFault
from collm.remote.wire import Completion, End, Given, Sampling, Token

__all__ = [
    "Address",
    "Client",
    "Completion",
    "End",
    "Given",
    "Sampling",
    "ServerFault",
    "Token",
    "is_url",
]
