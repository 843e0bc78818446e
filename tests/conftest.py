"""Fixtures every test file may use: third-party reference data, a small tokenizer, small random models.

The jaxtyping plugin hooks the first import of engram_interp (see `addopts`) before this file is read, so importing the
package here or in a test is safe. Models are shared by the whole session: use `fresh_engram` to change one.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import that reads them
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: one thread is fastest, and sums do not depend on the machine
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from engram_interp.models.house import HouseModel
    from engram_interp.training.config import TrainConfig

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Trains the tokenizer: enough words that "the", " the" and "The" become tokens which compress to one id.
TRAINING_SENTENCES = (
    "The harbour of the old town lies below the castle, and the castle looks over the harbour to the sea.",
    "By the way, the river Thames flows through London, and the river Seine flows through Paris.",
    "Alexander the Great was a king of Macedon; his teacher was the philosopher Aristotle.",
    "Diana, Princess of Wales, was born in Norfolk. The Prince of Wales was born in London.",
    "In 1905 the young physicist published four papers; in 1915 he published the general theory.",
    "The memory of a model answers when the last few words are a name it has seen many times before.",
    "Water boils at one hundred degrees, and it freezes at zero degrees, at the pressure of the sea level.",
    "On the other hand, the committee of the United Nations met in New York in the spring of the year.",
    "The quick brown fox jumps over the lazy dog while the five boxing wizards jump quickly.",
    "Mount Everest, the highest mountain of the world, stands between Nepal and the People's Republic of China.",
    "She wrote that the composer Ludwig van Beethoven had lived in Vienna, and that he had died in Vienna.",
    "A table of numbers: 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144 and 233, each the sum of the two before it.",
)

TEXTS = (
    "By the way, Alexander the Great was a king of Macedon.",
    "The Prince of Wales lives in London.",
    "Diana, Princess of Wales, was born in Norfolk.",
    "The river Seine flows through Paris to the sea.",
    "On the other hand, the castle was old.",
    "Aristotle was the teacher of the king.",
    "Mount Everest stands between Nepal and China.",
    "In 1915 he published the general theory.",
    "The fox jumps over the dog, and the dog sleeps.",
    "New York is a town by the sea.",
    "Beethoven lived in Vienna for many years.",
    "Zürich, naïve café, 東京 and 🙂 are words of many bytes.",
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of third-party reference data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("reference data not available: no folder `shared` beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """A dozen short texts; the last one has multi-byte characters."""
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of about 600 tokens, `<bos>` `<eos>` `<pad>` first."""
    from engram_interp.training.corpus import Document, train_tokenizer

    documents = [Document(sentence, str(i)) for i, sentence in enumerate(TRAINING_SENTENCES)]
    return train_tokenizer(documents, 600)


@pytest.fixture(scope="session")
def tiny_engram(tokenizer: Tokenizer) -> HouseModel:
    """A random Engram model: 4 blocks, memories in 1 and 3, 2 streams. Do not change it."""
    return random_model(tokenizer, "tiny-engram", routed_experts=6, memory=True)


@pytest.fixture(scope="session")
def tiny_moe(tokenizer: Tokenizer) -> HouseModel:
    """A random model without memory and with twice the experts. Do not change it."""
    return random_model(tokenizer, "tiny-moe", routed_experts=12, memory=False)


@pytest.fixture
def fresh_engram(tiny_engram: HouseModel) -> HouseModel:
    """A copy of `tiny_engram` that a test may change; its parameters take gradients."""
    return copy.deepcopy(tiny_engram).requires_grad_(True)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Shape annotations are not executed during this test: torch.compile cannot trace the checks."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _shared_models_stay_as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that changed a session's model or left a hook on it, not a later one."""
    names = [name for name in ("tiny_engram", "tiny_moe") if name in request.fixturenames]
    models = [request.getfixturevalue(name) for name in names]
    yield
    for name, model in zip(names, models, strict=True):
        assert weights_digest(model) == model.identity.weights_sha256, f"this test changed the weights of {name}"
        left = [hook for hook, point in model.hook_dict.items() if point._forward_hooks or point._backward_hooks]
        assert not left, f"this test left hooks on {name}: {left}"
        assert not model.training, f"this test left {name} in training mode"


def random_model(tokenizer: Tokenizer, name: str, *, routed_experts: int, memory: bool, seed: int = 20) -> HouseModel:
    """A small model in which every parameter is random, so that nothing under test is zero or one by accident."""
    import torch

    from engram_interp.memory import CompressedVocabulary
    from engram_interp.models.config import EngramConfig, ModelConfig
    from engram_interp.models.house import HouseModel, initialise
    from engram_interp.models.protocol import ModelIdentity

    vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
    engram = EngramConfig(
        blocks=(1, 3), rows_per_head=(61, 61), heads=4, head_width=4, compressed_vocab_size=vocabulary.size
    )
    config = ModelConfig(
        name=name,
        vocab_size=tokenizer.get_vocab_size(),
        context=64,
        width=32,
        layers=4,
        heads=2,
        streams=2,
        routed_experts=routed_experts,
        active_experts=2,
        expert_width=16,
        shared_width=16,
        engram=engram if memory else None,
    )
    model = HouseModel(config, vocabulary, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator, table_std=1.0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key == "embed.weight":
                parameter.mul_(10)  # logits with a spread near 1, so that predictions differ
            elif key.endswith(".conv"):
                parameter.normal_(0, 0.5, generator=generator)
            elif parameter.ndim == 1 or key.endswith("_norm"):  # gains and stream weights
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.eval().requires_grad_(False)
    model.identity = ModelIdentity(name, weights_digest(model), "random weights of the tests", "house")
    return model


def weights_digest(model: HouseModel) -> str:
    """SHA-256 of every weight's bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def training_run(
    tokenizer: Tokenizer, tiny_engram: HouseModel, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """A run of 24 steps of a two-block model on sentences that repeat; `out` is a folder that does not exist."""
    from engram_interp.training.config import TrainConfig
    from engram_interp.training.corpus import write_token_file

    folder = tmp_path_factory.mktemp("corpus")
    words = ["harbour", "castle", "river", "king", "Paris", "London", "sea", "Wales"]
    rng = np.random.default_rng(0)
    texts = [" ".join(f"The {a} of the {b} is old." for a, b in rng.choice(words, (6, 2))) for _ in range(60)]
    corpus = folder / "c.jsonl"
    corpus.write_text("".join(json.dumps({"title": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_token_file(folder / "train.bin", [corpus], tokenizer)
    memory = tiny_engram.cfg.engram
    assert memory is not None
    model = tiny_engram.cfg.model_copy(
        update={"name": "run", "layers": 2, "context": 16, "engram": memory.model_copy(update={"blocks": (1,)})}
    )
    return TrainConfig(
        model=model,
        tokenizer=folder / "tokenizer.json",
        train_tokens=folder / "train.bin",
        held_out_tokens=folder / "train.bin",
        out=folder / "never",
        tokens=24 * 4 * 16,
        batch=4,
        learning_rate=1e-2,
        warmup_steps=4,
        seed=3,
        compile=False,
        save_every=5,
        evaluate_every=12,
        evaluate_rows=6,
    )
