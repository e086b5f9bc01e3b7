# SPDX-License-Identifier: Apache-2.0
"""A real vLLM on the CPU against the same weights in transformers. `make test-vllm` runs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch

import opd_kernels as opk
from opd.clients import TeacherRefused, connect
from opd.clients.probe import probe
from opd.teachers import LocalConfig

PYTHON = os.environ.get("OPD_VLLM_PYTHON")
VOCAB_SIZE = 320
MAX_LENGTH = 256
MAX_TOPK = 64
K = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="make test-vllm says which Python has vLLM"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A random Llama whose heads are wide enough for vLLM, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = {f"w{i}": i for i in range(VOCAB_SIZE - 1)} | {"<end>": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.15,
        eos_token_id=VOCAB_SIZE - 1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local(path):
    source = LocalConfig(model_name_or_path=str(path))
    return source.build(None, device="cpu", vocab_size=None, workspace_bytes=1 << 24)


@pytest.fixture(scope="module")
def url(path, tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--enforce-eager"]
    command += ["--max-logprobs", str(MAX_TOPK), "--enable-scale-out"]
    # what this process has set for its own Python is not for another one
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=kept | variables
        )
        base = f"http://127.0.0.1:{port}"
        try:
            _wait(server, base, log)
            yield base
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait(server, base, log):
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vLLM was not ready after 300 s: {log.read_text()[-3000:]}")


@pytest.fixture(params=["completions", "generate"])
def client(request, url):
    client = connect("vllm", url, vocab_size=VOCAB_SIZE, endpoint=request.param, deadline_s=120)
    yield client
    client.close()


def texts():
    generator = torch.Generator().manual_seed(1)
    lengths, starts = (40, 17, 130, 5, 9), (10, 16, 3, 1, 9)
    return [torch.randint(0, 300, (n,), generator=generator) for n in lengths], list(starts)


def law_of(local, ids, start):
    with torch.no_grad():
        return local.model(ids[None]).logits[0, start - 1 : len(ids) - 1].log_softmax(-1)


def test_rows_are_those_of_transformers(client, local):
    sequences, starts = texts()
    for found, ids, start in zip(
        client.score(sequences, starts, num_topk=K), sequences, starts, strict=True
    ):
        law = law_of(local, ids, start)
        assert found.ids.shape == (len(law), K)
        got = law.gather(1, found.ids.long())
        torch.testing.assert_close(found.logprobs, got, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.logprobs, law.topk(K).values, rtol=0, atol=1e-4)
        own = law.gather(1, ids[start:, None])
        torch.testing.assert_close(found.token_logprobs, own, rtol=0, atol=1e-4)
        rest = law.scatter(1, found.ids.long(), -torch.inf).logsumexp(1)
        torch.testing.assert_close(found.tail_logprob, rest, rtol=1e-3, atol=1e-3)


def test_token_logprobs_alone(client, local):
    sequences, starts = texts()
    scores = client.score(sequences, starts, signal="token_logprobs")
    for found, ids, start in zip(scores, sequences, starts, strict=True):
        own = law_of(local, ids, start).gather(1, ids[start:, None])
        torch.testing.assert_close(found.token_logprobs, own, rtol=0, atol=1e-4)


def test_a_student_equal_to_the_teacher_has_no_loss(client, local):
    sequences, starts = texts()
    for found, ids, start in zip(
        client.score(sequences, starts, num_topk=MAX_TOPK), sequences, starts, strict=True
    ):
        law = law_of(local, ids, start)
        if not len(law):
            continue
        ours = torch.cat([law.gather(1, found.ids.long()), found.tail_logprob[:, None]], 1)
        rest = law.scatter(1, found.ids.long(), -torch.inf).logsumexp(1)
        theirs = torch.cat([found.logprobs, rest[:, None]], 1)
        loss = opk.divergence(ours, theirs, divergence="forward_kl")
        assert float(loss.abs().max()) < 1e-5


def test_the_probe_finds_nothing(client, local):
    report = probe(client, local, vocab_size=VOCAB_SIZE)
    assert report.max_error < 1e-3


def test_its_limits_are_explained(client):
    with pytest.raises(TeacherRefused, match=f"start it with --max-logprobs {MAX_TOPK + 1}"):
        client.score([torch.arange(5)], [1], num_topk=MAX_TOPK + 1)
    with pytest.raises(TeacherRefused, match="takes at most 255"):
        client.score([torch.zeros(MAX_LENGTH, dtype=torch.int64)], [1], num_topk=2)


def test_its_tokenizer_is_compared(client, path):
    from transformers import AutoTokenizer

    assert client.check(AutoTokenizer.from_pretrained(path)) == []
    with pytest.raises(TeacherRefused, match="one vocabulary"):
        client.check(lambda text, add_special_tokens: {"input_ids": [1, 2]})


def test_temperature_of_a_request_does_not_reach_the_prompt(url):
    """Why the client refuses every temperature but 1."""
    rows = []
    for temperature in (1.0, 0.5):
        body = {"model": "tiny", "prompt": [1, 2, 3, 4], "max_tokens": 1, "prompt_logprobs": 3}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"temperature": temperature}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            rows.append(json.load(reply)["choices"][0]["prompt_logprobs"])
    assert rows[0] == rows[1]
