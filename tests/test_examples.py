"""Does every example in a docstring of the library run and print what it says?"""

import doctest
import functools
import importlib
from pathlib import Path

import pytest

import engram_interp
from engram_interp.models import registry

PACKAGE = Path(engram_interp.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
MAIN = {
    "engram_interp": ("load", "load_pair", "ablate"),
    "engram_interp.memory": ("NgramHash", "CompressedVocabulary", "Engram"),
    "engram_interp.probes": (
        "record_gates", "read_gates", "logit_lens_kl", "linear_cka", "cka_heatmap", "soft_alignment",
        "ablation_effects", "memory_attribution", "patch_memory", "slot_collisions",
    ),
}  # fmt: skip
_FINDER = doctest.DocTestFinder(exclude_empty=True)
_TYPED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module", autouse=True)
def _checkpoints_are_read_once():
    """Examples open models as a reader would; reading the same file a dozen times would prove nothing more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load_model", functools.cache(registry.load_model))
        yield


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name, capsys):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=_TYPED)
    tried = 0
    for example in _FINDER.find(module, name):
        runner.run(example)
        tried += len(example.examples)
    assert tried, f"{name} has a line with >>> that doctest does not find"
    assert not runner.failures, capsys.readouterr().out


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in MAIN.items() for name in names])
def test_the_main_functions_have_an_example(module, name):
    thing = getattr(importlib.import_module(module), name)
    assert doctest.DocTestParser().get_examples(thing.__doc__ or ""), f"{module}.{name} has no example"
