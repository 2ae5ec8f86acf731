"""Requests that schemathesis makes up from the description: valid, nearly valid, absurd. None gets a 500."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
from conftest import client
from servers import fake_pair, live

from collm.serving.limits import Limits

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_made_up_requests_get_no_500(tmp_path: Path) -> None:
    with live(fake_pair(max_model_len=64), limits=Limits(max_choices=4)) as server:
        arguments = ["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "20"]
        arguments += ["--generation-deterministic", "--request-timeout", "30", "--no-color", "--continue-on-failure"]
        told = client("schemathesis", "run", f"{server.url}/openapi.json", *arguments, seconds=400)
        cases = sum(int(number) for number in re.findall(r"(\d+) generated", told))
        assert cases >= 500, told[-2000:]
        assert server.post("/v1/completions", json={"prompt": "Rome", "max_tokens": 2}).status_code == 200
        server.wait_idle()
        statuses = re.findall(r'http_requests_refused_total\{.*status="(\d+)"', httpx.get(server.url + "/metrics").text)
        assert not {"500"} & set(statuses), statuses
        assert json.loads(httpx.get(server.url + "/openapi.json").text)["openapi"].startswith("3.1")
