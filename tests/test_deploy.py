"""The commands in deploy/ are ones that collm understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from collm.cli.serve import serve
from collm.llm.sources import matched
from collm.remote.address import Address

DEPLOY = Path(__file__).parent.parent / "deploy"


def manifests() -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def commands() -> dict[str, list[str]]:
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]["collm"]["command"]
    [pod] = [
        m["spec"]["template"]["spec"]
        for m in manifests()
        if m["metadata"]["name"] == "collm" and m["kind"] != "Service"
    ]
    return {"compose": compose, "kubernetes": pod["containers"][0]["args"]}


@pytest.mark.parametrize("name", ["compose", "kubernetes"])
def test_the_door_is_started_rightly(name: str) -> None:
    command, *arguments = commands()[name]
    assert command == "serve"
    options = serve.make_context("serve", arguments).params
    base = Address.parse(options["checkpoint"])
    assert (base.kind, base.model) == ("vllm", "base") and base.tokenizer
    [info], [url] = matched(options["assistants"], [])
    expert = Address.parse(str(url))
    assert expert.model == "expert" == info.name and expert.tokenizer
    assert options["host"] == "0.0.0.0" and options["on_assistant_error"] == "base"
    assert len(expert.urls) == (3 if name == "kubernetes" else 1)


def test_names_and_ports_lead_somewhere() -> None:
    found = {(m["kind"], m["metadata"]["name"]): m["spec"] for m in manifests()}
    replicas = found["StatefulSet", "collm-assistant"]["replicas"]
    address = Address.parse(next(a for a in commands()["kubernetes"] if a.startswith("--assistant")).partition("=")[2])
    hosts = [url.removeprefix("http://").partition(":")[0] for url in address.urls]
    assert hosts == [f"collm-assistant-{n}.collm-assistant" for n in range(replicas)]
    assert found["Service", "collm-assistant"]["clusterIP"] == "None", "each replica has a name"
    for (kind, name), spec in found.items():
        if kind != "Service":
            assert ("Service", name) in found
            assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
            [container] = spec["template"]["spec"]["containers"]
            [port] = container["ports"]
            assert found["Service", name]["ports"][0]["targetPort"] == port["name"]
