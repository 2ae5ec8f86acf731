"""Manifests against the schemas of those who read them; the Dockerfile's RUN lines in an empty virtual environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python_of

DEPLOY = ROOT / "deploy"
COMPOSE = """
import os, sys
import compose_spec
found = compose_spec.PyCompose.from_yaml(os.path.expandvars(sys.stdin.read()))
found.validate()
print(*found.service_names())
"""
KUBERNETES = """
import sys
import kubernetes_validate, yaml
for resource in yaml.safe_load_all(sys.stdin):
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    print(resource["kind"])
"""


def validate(script: str, text: str) -> subprocess.CompletedProcess[str]:
    command = [str(python_of("manifests")), "-c", script]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_docker_compose_reads_it() -> None:
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", r"/\1", (DEPLOY / "docker-compose.yml").read_text())
    done = validate(COMPOSE, text)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"base", "assistant", "collm"}
    assert validate(COMPOSE, text.replace("depends_on", "depend_on")).returncode, "worth nothing unless it can fail"


def test_kubernetes_reads_it() -> None:
    text = (DEPLOY / "kubernetes.yaml").read_text()
    done = validate(KUBERNETES, text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("Service") == 3
    assert validate(KUBERNETES, text.replace("readinessProbe", "readyProbe")).returncode


@pytest.mark.skipif(bool(os.environ.get("VLLM_PYTHON")), reason="the environments are given, and none is made")
def test_the_dockerfile_s_run_lines_in_an_empty_environment(tmp_path: Path) -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    runs = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert len(runs) == 4 and {"src", "pyproject.toml"} <= set(copied)
    place, environment = tmp_path / "app", tmp_path / "venv"
    place.mkdir()
    for name in copied:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own["PATH"] = f"{environment / 'bin'}:{own['PATH']}"
    for line in runs:
        done = subprocess.run(["sh", "-c", line], cwd=place, env=own, capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
