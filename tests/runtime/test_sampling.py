"""The next token from integer logits, and text from tokens."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from qnpu_jax.errors import UserError
from qnpu_jax.models.tokenizer import Tokenizer
from qnpu_jax.runtime.generation import Speed, generate_ids, text_pieces
from qnpu_jax.runtime.sampling import Sampling, probabilities, sample
from qnpu_jax.runtime.session import Session

CODES = np.array([3, 127, 20, 127, -128, 60], np.int8)
SCALE = 0.02


def draws(sampling: Sampling, count: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(sampling.seed)
    drawn = [sample(CODES, SCALE, sampling, rng) for _ in range(count)]
    return np.bincount(drawn, minlength=len(CODES)) / count


def test_the_first_of_the_likeliest_without_temperature():
    assert draws(Sampling(), 3).tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    sampling = Sampling(temperature, seed=1)
    z = np.exp(CODES.astype(float) * SCALE / temperature)
    np.testing.assert_allclose(probabilities(CODES, SCALE, sampling), z / z.sum(), rtol=1e-12)
    # Five standard errors of a share of 1/2 in 2,000 draws.
    np.testing.assert_allclose(draws(sampling), z / z.sum(), atol=5 * 0.5 / 2000**0.5)


def test_the_same_seed_draws_the_same():
    one, two, other = (Sampling(1.0, seed=s) for s in (1, 1, 2))
    assert (draws(one) == draws(two)).all() and (draws(one) != draws(other)).any()


@pytest.mark.parametrize(("k", "left"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 5]), (99, range(6))])
def test_top_k(k, left):
    p = probabilities(CODES, SCALE, Sampling(1.0, top_k=k))
    assert np.flatnonzero(p).tolist() == list(left)
    assert p.sum() == pytest.approx(1)


def test_top_p_keeps_the_token_that_reaches_it():
    codes = np.log([0.5, 0.3, 0.15, 0.05]) / 1e-6
    codes = np.rint(codes).astype(np.int32)
    for top_p, left in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1.0, 4)):
        p = probabilities(codes, 1e-6, Sampling(1.0, top_p=top_p - 1e-7))
        assert np.count_nonzero(p) == left, top_p
    both = probabilities(codes, 1e-6, Sampling(1.0, top_k=2, top_p=0.6))
    assert np.count_nonzero(both) == 1  # 0.5 / 0.8 is more than 0.6


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError, match=r"sampling: temperature .*; expected .*; correct them"):
        Sampling(**wrong)


class Counting(Session):
    """A session whose likeliest token is one more than the last."""

    def __init__(self, room: int = 100) -> None:
        self.left, self.fed = room, []

    @property
    def logit_scale(self) -> float:
        return 1.0

    @property
    def room(self) -> int:
        return self.left

    def feed(self, ids):
        self.fed.append(list(ids))
        self.left -= len(ids)
        return np.eye(16, dtype=np.int8)[(ids[-1] + 1) % 16]


def generated(session, most=50, stops=(9,)) -> list[int]:
    speed = Speed()
    made = list(generate_ids(session, [3, 4], Sampling(), most, stops, speed))
    assert speed.prompt[0] == 2 and str(speed).startswith("prompt: 2 tokens, ")
    return made


def test_generation_ends_at_a_stop():
    session = Counting()
    assert generated(session) == [5, 6, 7, 8]
    assert session.fed == [[3, 4], [5], [6], [7], [8]]


def test_generation_ends_where_it_must():
    assert generated(Counting(), most=2) == [5, 6]
    assert generated(Counting(room=4)) == [5, 6, 7]  # the last one found no slot


def test_characters_of_several_tokens_come_whole():
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer.build(backend, [], [], None, "bytes")
    ids = tokenizer.encode("a é 本.")
    assert len(ids) == 9
    assert list(text_pieces(iter(ids), tokenizer)) == ["a", " ", "é", " ", "本", "."]
    assert list(text_pieces(iter(ids[:-2]), tokenizer))[-1] == "\ufffd"  # cut inside 本
    assert list(text_pieces(iter([]), tokenizer)) == []
