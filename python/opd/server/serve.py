# SPDX-License-Identifier: Apache-2.0
"""From the options of `opd serve-teacher` to a server that runs until a signal."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Literal

import uvicorn
from pydantic import Field, ValidationError, model_validator

from opd.model import resolve_device, resolve_model_path
from opd.schema import ConfigError, Section, sentences
from opd.server.app import AppSettings, build_app
from opd.server.connections import uvicorn_config
from opd.server.engine import Engine
from opd.teachers import LocalConfig

TOKEN_VARIABLE = "OPD_TEACHER_TOKEN"
_MIN_TOKEN = 16
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class ServeConfig(Section):
    """The options of `opd serve-teacher`, with dashes for underscores.

    Attributes:
        model: path or name of a model in the Hugging Face format, or `builtin:...`.
        host: address to listen on. Any but this machine's own needs a token.
        port: 0 takes a free one.
        dtype: of the weights; default: bfloat16 on a GPU, float32 on a CPU, which has no fast
            16-bit arithmetic as a rule.
        device: `auto` is the GPU if there is one.
        attn_implementation: as in transformers.
        vocab_size: the laws are over the first so many tokens of the head.
        max_length: tokens of a sequence; default: what the model has.
        max_batch_tokens: of a forward pass, padding included.
        max_queue: requests that wait or run; a further one gets 429.
        max_request_tokens: of all sequences of one request.
        max_topk: of a request.
        merge_ms: how long a batch that is not full waits for more.
        hidden_rank: also serve hidden states on so many singular directions of the head.
        num_threads: of torch on the CPU.
        shutdown_s: after a signal, requests get so long to finish.
        ssl_certfile, ssl_keyfile: serve https.
        trust_remote_code: run Python code that comes with the model.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = Field(8642, ge=0, le=65535)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "auto"
    attn_implementation: str | None = None
    vocab_size: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=2)
    max_batch_tokens: int = Field(16_384, ge=1)
    max_queue: int = Field(64, ge=1)
    max_request_tokens: int = Field(65_536, ge=1)
    max_topk: int = Field(4096, ge=1, le=4096)
    merge_ms: float = Field(5.0, ge=0, le=1000)
    hidden_rank: int = Field(0, ge=0)
    num_threads: int | None = Field(None, ge=1)
    shutdown_s: int = Field(30, ge=0)
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check_certificate(self) -> ServeConfig:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile: both are required for https")
        for path in (self.ssl_certfile, self.ssl_keyfile):
            if path is not None and not Path(path).is_file():
                raise ValueError(f"no such file {path!r}")
        return self


def parse_options(values: dict[str, Any]) -> ServeConfig:
    """Checked options.

    Raises:
        ConfigError: one sentence per option that is wrong.
    """
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(sentences(error, ServeConfig, "opd serve-teacher")) from None


def read_token(host: str) -> str:
    """The token of the environment.

    Raises:
        ConfigError: none, or a short one, for an address that other machines reach.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"{TOKEN_VARIABLE}: must be printable ASCII without spaces")
    if not is_loopback(host) and len(token) < _MIN_TOKEN:
        found = f"one of {len(token)} characters" if token else "none"
        raise ConfigError(
            f"--host: other machines reach {host!r}, so {TOKEN_VARIABLE} must be a token of at "
            f"least {_MIN_TOKEN} characters, got {found}; `openssl rand -hex 32` makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_engine(config: ServeConfig) -> Engine:
    """The model, ready to score.

    Raises:
        ConfigError: no such model, or limits that it has not.
    """
    import torch

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    on_gpu = resolve_device(config.device).type != "cpu"
    source = LocalConfig(
        model_name_or_path=config.model,
        dtype=config.dtype or ("bfloat16" if on_gpu else "float32"),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    try:
        teacher = source.build(
            None, device=config.device, vocab_size=config.vocab_size, workspace_bytes=1 << 28
        )
    except ConfigError as error:
        # a training run would call it so
        text = re.sub(r"^teacher(\.model_name_or_path)?:", "--model:", str(error))
        raise ConfigError(text) from None
    rows = teacher.lm_head_weight.shape[0]
    if config.vocab_size is not None and config.vocab_size > rows:
        raise ConfigError(f"--vocab-size: the head has {rows} tokens, got {config.vocab_size}")
    try:
        return Engine(
            teacher,
            name=config.model,
            tokenizer=_tokenizer(config),
            hidden_rank=config.hidden_rank,
            max_length=config.max_length or 0,
            max_request_tokens=config.max_request_tokens,
            max_topk=config.max_topk,
        )
    except ValueError as error:
        raise ConfigError(f"--hidden-rank: {error}") from None


def serve(config: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT; requests that were taken are finished first.

    Returns:
        0 after a signal.

    Raises:
        ConfigError: an option that does not work, a port that is taken.
    """
    from transformers.utils import logging as hf_logging

    token = read_token(config.host)
    listener = _listen(config.host, config.port)
    hf_logging.disable_progress_bar()
    with listener:
        engine = load_engine(config)
        settings = AppSettings(
            token=token,
            max_batch_tokens=config.max_batch_tokens,
            max_queue=config.max_queue,
            merge_s=config.merge_ms / 1000,
            hosts=() if token else _LOCAL_NAMES,
        )
        server = uvicorn.Server(
            uvicorn_config(
                build_app(engine, settings),
                max_queue=config.max_queue,
                timeout_graceful_shutdown=config.shutdown_s,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )
        _tell(config, engine, listener)
        # uvicorn raises a signal again once it has stopped; by then it is done with
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    if not server.started:
        raise ConfigError("opd serve-teacher: the server did not start, see above")
    print("stopped", file=sys.stderr)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--host, --port: cannot listen on {host}:{port}: {reason}") from None


def _tell(config: ServeConfig, engine: Engine, listener: socket.socket) -> None:
    scheme = "https" if config.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    port = listener.getsockname()[1]
    limits = engine.limits
    print(
        f"serving {engine.name} ({limits.vocab_size} tokens, {engine.dtype}, fingerprint "
        f"{engine.fingerprint}) on {scheme}://{host}:{port}",
        flush=True,
    )


def _tokenizer(config: ServeConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            resolve_model_path(config.model), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError):
        logging.getLogger(__name__).warning(
            "'%s' has no tokenizer, so clients cannot check that its tokens are theirs",
            config.model,
        )
        return None
