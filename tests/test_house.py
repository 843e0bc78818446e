"""The house transformer: hooks that change nothing, decomposition, refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from engram_interp.memory import CompressedVocabulary
from engram_interp.models.cache import EngramCache
from engram_interp.models.config import EngramConfig, ModelConfig
from engram_interp.models.house import HouseModel, initialise
from engram_interp.models.streams import StreamConnection

VOCAB, PAD = 60, 2


def memory_in(*blocks: int) -> EngramConfig:
    return EngramConfig(blocks=blocks, rows_per_head=(31, 40), heads=2, head_width=4, compressed_vocab_size=VOCAB)


def build(streams: int = 2, seed: int = 0, **options: object) -> HouseModel:
    """A small random model over uncompressed ids."""
    settings = {
        "name": "small",
        "vocab_size": VOCAB,
        "context": 48,
        "width": 16,
        "layers": 3,
        "heads": 2,
        "streams": streams,
        "routed_experts": 6,
        "active_experts": 2,
        "expert_width": 8,
        "shared_width": 8,
        "engram": memory_in(1, 2),
    }
    model = HouseModel(ModelConfig(**settings | options), CompressedVocabulary.identity(VOCAB))
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator, table_std=1.0)
    with torch.no_grad():
        model.embed.weight.mul_(20)
        for name, parameter in model.named_parameters():
            if name.endswith(".conv"):
                parameter.normal_(0, 0.5, generator=generator)
            elif parameter.ndim == 1 or name.endswith("_norm"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval().requires_grad_(False)


def random_tokens(batch: int, length: int, seed: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(PAD + 1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def hook_count(model: HouseModel) -> int:
    return sum(len(point._forward_hooks) + len(point._backward_hooks) for point in model.hook_dict.values())


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_change_no_output_bit(tiny_engram: HouseModel) -> None:
    tokens = random_tokens(3, 40, vocab=tiny_engram.vocab_size)
    without = copy.deepcopy(tiny_engram)
    for module in list(without.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, HookPoint):
                setattr(module, name, nn.Identity())
    expected = without(tokens)
    assert not any(isinstance(module, HookPoint) for module in without.modules())
    assert torch.equal(tiny_engram(tokens), expected)
    names = list(tiny_engram.hook_dict)
    for hook in (lambda value, hook: None, lambda value, hook: value, lambda value, hook: value.clone()):
        with tiny_engram.hooks(fwd_hooks=[(name, hook) for name in names]):
            assert torch.equal(tiny_engram(tokens), expected)
    logits, cache = tiny_engram.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert isinstance(cache, EngramCache)
    assert set(cache.keys()) == set(names)


def test_every_promised_hook_point_fires_once_with_its_shape(tiny_engram: HouseModel) -> None:
    _, cache = tiny_engram.run_with_cache(random_tokens(2, 9, vocab=tiny_engram.vocab_size))
    shapes = {
        "resid_pre": (2, 9, 2, 32), "engram_out": (2, 9, 2, 32), "resid_mid": (2, 9, 2, 32),
        "resid_post": (2, 9, 2, 32),
    }  # fmt: skip
    memory = {
        "slots": (2, 9, 8), "embedding": (2, 9, 32), "key": (2, 9, 2, 32), "value": (2, 9, 32), "score": (2, 9, 2),
        "gate": (2, 9, 2), "gated_value": (2, 9, 2, 32), "conv_out": (2, 9, 2, 32),
    }  # fmt: skip
    mlp = {"router_logits": (2, 9, 6), "expert_indices": (2, 9, 2), "expert_weights": (2, 9, 2)}
    for block in range(4):
        expected = {f"hook_{k}": v for k, v in shapes.items() if k != "engram_out" or block in (1, 3)}
        expected |= {f"mlp.hook_{k}": v for k, v in mlp.items()}
        expected |= {f"engram.hook_{k}": v for k, v in memory.items()} if block in (1, 3) else {}
        for name, shape in expected.items():
            assert tuple(cache[f"blocks.{block}.{name}"].shape) == shape, name
    assert "blocks.0.hook_engram_out" not in cache


def test_filters_select_names_patterns_and_predicates(tiny_engram: HouseModel) -> None:
    tokens = random_tokens(1, 5, vocab=tiny_engram.vocab_size)
    select = lambda names: list(tiny_engram.run_with_cache(tokens, names)[1].keys())  # noqa: E731
    assert select("blocks.1.engram.hook_gate") == ["blocks.1.engram.hook_gate"]
    assert select("*.hook_gate") == ["blocks.1.engram.hook_gate", "blocks.3.engram.hook_gate"]
    assert select(["hook_embed", "blocks.0.hook_resid_p*"]) == [
        "hook_embed", "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post",
    ]  # fmt: skip
    assert select(lambda name: name.endswith("hook_resid_mid")) == [f"blocks.{i}.hook_resid_mid" for i in range(4)]


@pytest.mark.parametrize("names", ["blocks.0.hook_resid_pots", ["hook_embed", "blocks.0.hook_resid_pots"]])
def test_a_filter_that_matches_nothing_lists_near_names(tiny_engram: HouseModel, names: str | list[str]) -> None:
    tokens = random_tokens(1, 5, vocab=tiny_engram.vocab_size)
    with pytest.raises(KeyError, match=r"blocks\.0\.hook_resid_pots.*nearest: .*blocks\.0\.hook_resid_post"):
        tiny_engram.run_with_cache(tokens, names)
    with pytest.raises(KeyError, match="selects none"):
        tiny_engram.run_with_cache(tokens, lambda name: False)
    with (
        pytest.raises(KeyError, match=r"nearest: .*hook_engram_out"),
        tiny_engram.hooks(fwd_hooks=[("blocks.1.hook_engram_ot", lambda value, hook: None)]),
    ):
        pytest.fail("a hook was attached to nothing")
    assert hook_count(tiny_engram) == 0


def test_hooks_do_not_outlive_their_with(tiny_engram: HouseModel) -> None:
    tokens = random_tokens(2, 8, vocab=tiny_engram.vocab_size)
    before, count = tiny_engram(tokens), hook_count(tiny_engram)

    def explode(value, hook):
        raise RuntimeError("inside the hook")

    with (
        pytest.raises(RuntimeError, match="inside the hook"),
        tiny_engram.hooks(
            fwd_hooks=[("hook_embed", lambda value, hook: 0 * value), ("blocks.2.hook_attn_out", explode)]
        ),
    ):
        tiny_engram(tokens)
    with pytest.raises(ValueError, match="no padding|padding"):
        tiny_engram.run_with_cache(tokens.new_tensor([[PAD, 5]]))
    assert hook_count(tiny_engram) == count
    assert torch.equal(tiny_engram(tokens), before)
    acquired = threading.Thread(target=lambda: tiny_engram(tokens))
    acquired.start()
    acquired.join(timeout=10)
    assert not acquired.is_alive(), "the lock is still held"


def test_a_later_write_in_place_does_not_change_a_record() -> None:
    model = build(streams=1)
    tokens = random_tokens(1, 6)
    name = "blocks.2.hook_resid_mid"
    _, untouched = model.run_with_cache(tokens, name)
    # the only stream is read as a view, so this writes into the tensor that the hook point saw
    handle = model.blocks[2].ln2.register_forward_pre_hook(lambda _, args: args[0].zero_())
    try:
        _, cloned = model.run_with_cache(tokens, name)
        _, aliased = model.run_with_cache(tokens, name, clone=False)
    finally:
        handle.remove()
    assert not aliased[name].any(), "without a clone the record is overwritten: this test can fail"
    assert torch.equal(cloned[name], untouched[name])


def test_threads_never_see_each_other_s_hooks() -> None:
    model, runs = build(layers=1, engram=memory_in(0)), 100
    tokens = random_tokens(1, 3)
    zero = [("blocks.0.hook_engram_out", lambda value, hook: torch.zeros_like(value))]
    plain = model(tokens)
    with model.hooks(fwd_hooks=zero):
        ablated = model(tokens)
    gate = "blocks.0.engram.hook_gate"
    expected_gate = model.run_with_cache(tokens, gate)[1][gate]
    assert not torch.equal(plain, ablated)
    wrong: list[str] = []

    def ablating() -> None:
        with model.hooks(fwd_hooks=zero):
            if not torch.equal(model(tokens), ablated):
                wrong.append("ablated")

    def reading() -> None:
        logits, cache = model.run_with_cache(tokens, gate)
        if not (torch.equal(logits, plain) and torch.equal(cache[gate], expected_gate)):
            wrong.append("cache")

    def running() -> None:
        if not torch.equal(model(tokens), plain):
            wrong.append("plain")

    start = threading.Barrier(3)

    def repeat(work) -> None:
        start.wait()
        for _ in range(runs):
            work()

    threads = [threading.Thread(target=repeat, args=(work,)) for work in (ablating, reading, running)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert hook_count(model) == 0


COMPILED = """
import torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from engram_interp.memory import CompressedVocabulary
from engram_interp.models.config import ModelConfig
from engram_interp.models.house import HouseModel, initialise

config = ModelConfig.model_validate_json('''{config}''')
model = HouseModel(config, CompressedVocabulary.identity(config.vocab_size))
initialise(model, torch.Generator().manual_seed(0), table_std=1.0).requires_grad_(False)
tokens = torch.randint(3, config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
zero = [("blocks.0.hook_engram_out", lambda value, hook: torch.zeros_like(value))]
plain = model(tokens)
with model.hooks(fwd_hooks=zero):
    ablated = model(tokens)
assert (plain - ablated).abs().max() > 1e-2
for name in ("model", "blocks"):
    if name == "model":
        run = torch.compile(model, backend="eager")
    else:
        torch._dynamo.reset()
        run = model
        for block in model.blocks:
            block.compile(backend="eager")
    before = run(tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    with model.hooks(fwd_hooks=zero):
        hooked = run(tokens)
    for found, expected in ((before, plain), (hooked, ablated), (run(tokens), plain)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    print("compiled", name, "obeys its hooks")
"""


@pytest.mark.slow
def test_a_hook_set_after_compilation_is_not_ignored() -> None:
    # In a process of its own: the shape checks of the tests wrap every function that the compiler would trace.
    script = COMPILED.format(config=build(layers=1, engram=memory_in(0)).cfg.model_dump_json())
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["compiled model obeys its hooks", "compiled blocks obeys its hooks"]


# -- refusals and sampling -------------------------------------------------------------------------------------------


def test_tokens_that_cannot_be_read_are_refused(tiny_engram: HouseModel) -> None:
    vocab = tiny_engram.vocab_size
    for bad in (vocab, -1, 10**9):
        with pytest.raises(ValueError, match=rf"token ids in \[0, {vocab}\), found {bad}$"):
            tiny_engram(torch.tensor([[4, bad, 5]]))
    with pytest.raises(ValueError, match="at most 64 tokens, found 65"):
        tiny_engram(random_tokens(1, 65))
    for shape in ((1, 0), (0, 4)):
        with pytest.raises(ValueError, match="empty text"):
            tiny_engram(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="empty text"):
        tiny_engram.to_tokens("")
    with pytest.raises(ValueError, match="at most 63 tokens of text, found"):
        tiny_engram.to_tokens("a b c d e f g h " * 20)
    with pytest.raises(ValueError, match=r"block 0 has no memory; memories are in blocks \[1, 3\]"):
        tiny_engram.engram(0)
    with pytest.raises(ValueError, match="without a tokenizer"):
        build().to_tokens("a")
    state = tiny_engram.start_decoding(1)
    tiny_engram(random_tokens(1, 60), state)
    with pytest.raises(ValueError, match="at most 64 tokens, found 65"):
        tiny_engram(random_tokens(1, 5), state)


def test_sampling_is_seeded_and_never_pads() -> None:
    model = build(layers=1, engram=memory_in(0))
    start = random_tokens(64, 2)
    sample = lambda seed: model.generate(  # noqa: E731
        start, 14, temperature=1e6, generator=torch.Generator().manual_seed(seed)
    )
    first = sample(0)
    assert torch.equal(first, sample(0))
    assert not torch.equal(first, sample(1))
    assert set(range(VOCAB)) - set(first.flatten().tolist()) == {PAD}  # near-uniform: everything but padding occurs
    with pytest.raises(ValueError, match="torch.Generator"):
        model.generate(start, 1, temperature=1.0)


# -- streams and decomposition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [2, 3, 4])
def test_stream_mixing_is_doubly_stochastic(streams: int) -> None:
    model = build(streams=streams)
    for block in model.blocks:
        for connection in (block.attn_stream, block.mlp_stream):
            mix = connection.mix()
            assert bool((mix > 0).all())
            torch.testing.assert_close(mix.sum(0), torch.ones(streams))
            torch.testing.assert_close(mix.sum(1), torch.ones(streams))
            torch.testing.assert_close(connection.pre().sum(), torch.tensor(1.0))
            hidden, out = torch.randn(1, 2, streams, 16), torch.randn(1, 2, 16)
            written = connection.write(hidden, out)
            expected = torch.einsum("mn,btnd->btmd", mix, hidden) + out.unsqueeze(2) * connection.post()[:, None]
            torch.testing.assert_close(written, expected)
            torch.testing.assert_close(connection.read(hidden), torch.einsum("m,btmd->btd", connection.pre(), hidden))


def test_streams_are_mixed_by_cyclic_shifts() -> None:
    """Weight s of three moves stream n to stream n + s; two streams could not tell this from n - s."""
    connection = StreamConnection(3, sublayer=0)
    with torch.no_grad():
        connection.mix_logits.copy_(torch.tensor([0.1, 0.2, 0.7]).log())
    expected = torch.tensor([[0.1, 0.7, 0.2], [0.2, 0.1, 0.7], [0.7, 0.2, 0.1]])
    torch.testing.assert_close(connection.mix(), expected)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_decomposition_sums_to_the_residual(streams: int) -> None:
    model = build(streams=streams).double()
    tokens = random_tokens(2, 11)
    logits, cache = model.run_with_cache(tokens)
    residuals = cache.accumulated_resid()
    assert residuals.shape == (4, 2, 11, 16)
    for layer in (0, 1, 2, 3, None):
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        assert labels[0] == "embed"
        assert len(labels) == len(set(labels)) == len(parts)
        torch.testing.assert_close(parts.sum(0), residuals[3 if layer is None else layer], rtol=0, atol=1e-12)
    assert labels == [
        "embed", "0_attn_out", "0_mlp_out", "1_engram_out", "1_attn_out", "1_mlp_out", "2_engram_out", "2_attn_out",
        "2_mlp_out",
    ]  # fmt: skip
    memory = parts[labels.index("1_engram_out")]
    assert memory.abs().max() > 1e-2, "a decomposition without the memory would not sum"
    exit_path = model.unembed(model.ln_final(residuals[-1]))
    torch.testing.assert_close(exit_path, logits, rtol=0, atol=1e-12)


def test_a_single_stream_is_a_plain_residual() -> None:
    model = build(streams=1)
    assert not [name for name, _ in model.named_parameters() if "_stream" in name]
    tokens = random_tokens(1, 9)
    _, cache = model.run_with_cache(tokens)
    for i in range(3):
        pre, mid, post = (cache[f"blocks.{i}.hook_resid_{site}"].squeeze(2) for site in ("pre", "mid", "post"))
        memory = cache[f"blocks.{i}.hook_engram_out"].squeeze(2) if i else 0
        torch.testing.assert_close(mid, pre + memory + cache[f"blocks.{i}.hook_attn_out"])
        torch.testing.assert_close(post, mid + cache[f"blocks.{i}.hook_mlp_out"])


def test_residuals_end_where_the_exit_begins(tiny_engram: HouseModel) -> None:
    tokens = random_tokens(2, 13, vocab=tiny_engram.vocab_size)
    residuals = tiny_engram.residuals(tokens)
    assert len(residuals) == 5
    assert torch.equal(tiny_engram.logits(residuals[-1]), tiny_engram(tokens))
    assert torch.equal(tiny_engram.unembed(tiny_engram.exit_hidden(residuals[-1])), tiny_engram(tokens))
    _, cache = tiny_engram.run_with_cache(tokens, "blocks.*.hook_resid_post")
    assert all(torch.equal(residuals[i + 1], cache[f"blocks.{i}.hook_resid_post"]) for i in range(4))


def test_analyses_that_assume_one_stream_refuse(tiny_engram: HouseModel) -> None:
    _, cache = tiny_engram.run_with_cache(random_tokens(1, 4, vocab=tiny_engram.vocab_size))
    for name in ("logit_lens", "logit_attrs", "stack_head_results", "get_full_resid_decomposition"):
        with pytest.raises(NotImplementedError, match="decompose_resid"):
            getattr(cache, name)()
    with pytest.raises(ValueError, match=r"layer in \[0, 4\], found 5"):
        cache.decompose_resid(5)


# -- the memory inside the model -------------------------------------------------------------------------------------


def test_memories_hash_as_the_demo_numbers_them(tiny_engram: HouseModel) -> None:
    from engram_interp.memory import assign_primes, pcg64_multipliers

    first, second = assign_primes([61, 61], 4, 2)
    size = tiny_engram.vocabulary.size
    for block, primes in ((1, first), (3, second)):
        ngram_hash = tiny_engram.engram(block).ngram_hash
        assert ngram_hash.primes == primes
        assert ngram_hash.multipliers == pcg64_multipliers(0, block, size, 3)
        assert ngram_hash.pad == int(tiny_engram.vocabulary.token_map[PAD])


def test_a_layer_that_writes_zero_is_as_if_absent(tiny_engram: HouseModel) -> None:
    tokens = random_tokens(2, 10, vocab=tiny_engram.vocab_size)
    silent = copy.deepcopy(tiny_engram)
    for block in silent.engram_layers:
        silent.engram(block).value_proj.weight.zero_()
    zero = [(f"blocks.{i}.hook_engram_out", lambda value, hook: torch.zeros_like(value)) for i in (1, 3)]
    with tiny_engram.hooks(fwd_hooks=zero):
        assert torch.equal(silent(tokens), tiny_engram(tokens))


def test_a_tokenizer_of_another_size_is_refused() -> None:
    config = build().cfg
    with pytest.raises(ValueError, match="compresses to 60 ids, found 61"):
        HouseModel(config, CompressedVocabulary.identity(61))
