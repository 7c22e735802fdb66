"""lm-eval on a model of blocks, and with caches: likelihoods against the chain rule, and generated text."""

import pytest
import torch

from scmdm.diffusion.state import State
from scmdm.errors import UserError
from tests.sampling.small_models import TOKENIZER, export

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance

from scmdm.integrations import lm_eval as harness


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    keys = {"self_conditioned": True}
    return {size: export(place / f"blocks{size}", block_length=size, **keys) for size in (None, 1, 4)}


def model(place, **keys):
    return harness.MaskedDiffusionLM(str(place), device="cpu", precision="float32", steps=16, **keys)


def asked(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)]


@torch.no_grad()
@pytest.mark.parametrize("carry", ["never", "auto"])
def test_blocks_of_one_token_have_the_autoregressive_likelihood(carry, places):
    own = model(places[1], carry=carry)
    ((found, greedy),) = own.loglikelihood(asked("loglikelihood", ("ab", "cde")))
    network, ids = own._loaded.model, [TOKENIZER.bos_id, *TOKENIZER.encode("abcde")]
    expected, best = 0.0, True
    for at in range(3, 6):
        z = torch.tensor([[*ids[:at], TOKENIZER.mask_id]])
        estimate = None
        if carry == "auto":
            estimate = network.estimate(State(z, torch.ones(1).double()))
            estimate[:, :-1] = 0
        log_p = network.logits(network.hidden(State(z, torch.ones(1).double(), estimate))[:, -1]).log_softmax(-1)[0]
        expected += float(log_p[ids[at]])
        best &= int(log_p.argmax()) == ids[at]
    assert found == pytest.approx(expected, rel=1e-4)
    assert isinstance(greedy, bool) and (greedy == best or carry == "auto")


def test_generation_does_not_depend_on_the_cache(places, capsys):
    """GSM8K-type requests: prompts of several lengths in one batch, and threshold decoding."""
    requests = asked("generate_until", *((text, {"until": ["h"], "max_gen_toks": 6}) for text in ("ab", "abcde", "c")))
    for keys in ({}, {"threshold": 0.4}, {"tail": "none"}):
        found = [
            model(places[4], cache=cache, batch_size=3, **keys).generate_until(requests) for cache in ("auto", "none")
        ]
        assert found[0] == found[1] and len(found[0]) == 3
    assert "cache=" not in capsys.readouterr().err
    texts = model(places[None], cache="dual", block_length=4, batch_size=3).generate_until(requests)
    assert len(texts) == 3 and "cache=dual" in capsys.readouterr().err  # what the approximation changes


def test_guided_likelihoods_of_blocks_are_refused(places):
    with pytest.raises(UserError, match="cfg=1"):
        model(places[4], cfg=1).loglikelihood(asked("loglikelihood", ("ab", "cde")))
