"""Names the outside relies on exist and are what they say."""

import pytest

import engram_interp
from engram_interp import probes


@pytest.mark.parametrize("name", probes.__all__)
def test_every_exported_probe_can_be_imported(name):
    assert callable(getattr(probes, name))


def test_top_level_names():
    for name in ("load", "load_pair", "ablate", "Pair"):
        assert callable(getattr(engram_interp, name))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        engram_interp.laod  # noqa: B018


def test_checkouts_probes_are_the_librarys():
    import probes as programs

    assert programs.logit_lens_kl is probes.logit_lens_kl
