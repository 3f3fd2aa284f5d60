"""What the engine tests share: a model, reference tokens of stock vLLM, and two elastic servers."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from integration.engine import BLOCK_TOKENS, MIB, Generated, Request, Server, family, generate
from integration.models import Shape, write_model
from kvcached_vmm.ledger import Ledger

pytest.register_assert_rewrite("integration.patient")

EXTENT_BYTES = 2 * MIB
BUDGET_BYTES = 48 * MIB
DECAY_S = 1
CACHE_TTL_S = 4


class Holding(NamedTuple):
    """KV bytes of an engine: touched, says the kernel; committed, says the ledger."""

    in_kernel: int
    in_ledger: int


class Pair(NamedTuple):
    """Two servers that share one ledger and one budget, which cannot hold both of their peaks."""

    plain: Server
    caching: Server
    folder: Path
    idle: tuple[Holding, Holding]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    """220 mixed requests; the last two differ in their first tokens only."""
    rng = random.Random(7)
    rest = random_prompt(600, rng)
    probes = [Request(random_prompt(64, rng) + rest, 32) for _ in range(2)]
    return [*mixed_requests(218), *probes]


@pytest.fixture(scope="session")
def lanes() -> Iterator[Executor]:
    """Runs what is submitted two at a time: every engine here computes with one thread."""
    with ThreadPoolExecutor(2) as executor:
        yield executor


def cases(names: Iterable[str], long: Collection[str]) -> list[Any]:
    """Parameters of a test, those in ``long`` for `make test-long`."""
    return [pytest.param(name, marks=[pytest.mark.long] * (name in long)) for name in names]


def asked_for(request: pytest.FixtureRequest, parameter: str) -> list[str]:
    """Values of ``parameter`` in the selected tests of this module that use the fixture of
    ``request``: nothing else is worth starting an engine for."""
    calls = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and request.fixturename in item.fixturenames
    ]
    return sorted({params[parameter] for params in calls})


@pytest.fixture(scope="session")
def stock(
    lanes: Executor, model: Path, requests: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> Future[Generated]:
    """What stock vLLM makes of `requests`, soon."""
    folder = tmp_path_factory.mktemp("stock")
    return lanes.submit(generate, model, requests, folder, kv_cache_memory_bytes=256 * MIB)


@pytest.fixture
def reference(stock: Future[Generated]) -> list[list[int]]:
    """The tokens of stock vLLM for `requests`. Waits: so after fixtures that start engines."""
    return stock.result().tokens


@pytest.fixture(scope="session")
def plugin() -> None:
    """Fails unless vLLM would find our entry point in this environment."""
    names = {each.name for each in entry_points(group="vllm.general_plugins")}
    assert "kvcached" in names, "the package is not installed here; run `make test`"


@pytest.fixture(scope="session")
def pair(plugin: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two servers, started together: without prefix caching, and with it."""
    logs = tmp_path_factory.mktemp("pair")
    folder = logs / "ledger"
    env = {
        **elastic_env(folder),
        "KVCACHED_BUDGET": f"{BUDGET_BYTES // MIB}MiB",
        "KVCACHED_EXTENT": f"{EXTENT_BYTES // MIB}MiB",
        "KVCACHED_DECAY": str(DECAY_S),
        "KVCACHED_CACHE_TTL": str(CACHE_TTL_S),
    }
    arguments = {
        "plain": ["--no-enable-prefix-caching"],
        "caching": ["--enable-prefix-caching", "--max-num-batched-tokens", "512"],
    }
    servers = []
    try:
        for name, extra in arguments.items():
            named = {**env, "KVCACHED_NAME": name}
            servers.append(Server(model, logs / f"{name}.log", env=named, arguments=extra))
        for server in servers:
            server.wait_ready()
        plain, caching = servers
        yield Pair(plain, caching, folder, (holding(plain, folder), holding(caching, folder)))
    finally:
        for server in servers:
            server.stop()


def write_test_model(folder: Path) -> Path:
    """A Llama whose greedy tokens depend on all of its context, in float32.

    The weights of `--load-format dummy` are so small that the tokens hardly depend on the KV cache:
    a broken cache would not show. In bfloat16 ties make stock vLLM differ from itself when prompts
    are batched in another way; in float32 it does not.
    """
    shape = Shape(layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64)
    write_model(folder, shape)
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": "float32", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    _write_weights(folder, shape)
    return folder


def mixed_requests(count: int, *, seed: int = 1, longest: int = 1500) -> list[Request]:
    """Prompts of 8 to `longest` tokens, every third one with one of three common prefixes."""
    rng = random.Random(seed)
    prefixes = [random_prompt(size, rng) for size in (BLOCK_TOKENS, 300, 640)]
    edges = (8, 20, 60, 127, 128, 129, 255, 256, 257, 450, 1000, longest)
    requests = []
    for number in range(count):
        size = rng.choice(edges) if number % 2 else rng.randint(8, longest)
        prompt = random_prompt(size, rng)
        if number % 3 == 0:
            prompt = (rng.choice(prefixes) + prompt)[: max(size, 20)]
        requests.append(Request(prompt[:longest], rng.randint(4, 64)))
    return requests


def random_prompt(size: int, rng: random.Random) -> list[int]:
    """`size` token ids, none of them special."""
    return [rng.randrange(2, 2000) for _ in range(size)]


def holding(server: Server, folder: Path) -> Holding:
    """What `server` holds now; `folder` is where its ledger is."""
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        pids = {process.pid for process in family(server.process.pid)}
        accounts = [each for each in ledger.snapshot().accounts if each.pid in pids]
    assert accounts, f"the ledger does not know this engine; {server}"
    return Holding(server.kv_bytes(), sum(each.committed_bytes for each in accounts))


def elastic_env(folder: Path) -> dict[str, str]:
    """Variables that switch the elastic cache on, with its ledger in `folder`."""
    return {"ENABLE_KVCACHED": "1", "KVCACHED_DIR": str(folder)}


def _write_weights(folder: Path, shape: Shape) -> None:
    """Random weights with a strong attention path and a wide spread of logits."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)

    def normal(rows: int, columns: int, gain: float) -> Any:
        scale = np.float32(gain / columns**0.5)
        return rng.standard_normal((rows, columns), dtype=np.float32) * scale

    hidden, inner, vocabulary = shape.hidden, shape.intermediate, shape.vocabulary
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = np.ones(hidden, np.float32)
    weights = {
        "model.embed_tokens.weight": normal(vocabulary, hidden, hidden**0.5),
        "model.norm.weight": ones,
        "lm_head.weight": normal(vocabulary, hidden, 4.0),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        weights |= {
            f"{at}input_layernorm.weight": ones,
            f"{at}post_attention_layernorm.weight": ones,
            f"{at}self_attn.q_proj.weight": normal(queries, hidden, 1.5),
            f"{at}self_attn.k_proj.weight": normal(keys, hidden, 1.5),
            f"{at}self_attn.v_proj.weight": normal(keys, hidden, 1.5),
            f"{at}self_attn.o_proj.weight": normal(hidden, queries, 2.0),
            f"{at}mlp.gate_proj.weight": normal(inner, hidden, 1.0),
            f"{at}mlp.up_proj.weight": normal(inner, hidden, 1.0),
            f"{at}mlp.down_proj.weight": normal(hidden, inner, 1.0),
        }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
