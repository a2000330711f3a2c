"""Packing and masking of training windows."""

from __future__ import annotations

import pytest
import torch

from fastff.errors import ShapeError
from fastff.text.windows import IGNORED, mask_tokens, pack

MASK, SPECIAL, VOCABULARY = 4, 5, 300


def masked(tokens, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return mask_tokens(tokens, mask=MASK, vocab_size=VOCABULARY, special=SPECIAL, generator=generator, **options)


def test_pack_cuts_windows_between_first_and_last():
    windows = pack(list(range(10, 23)), seq_len=6, first=2, last=3)
    assert windows.tolist() == [[2, 10, 11, 12, 13, 3], [2, 14, 15, 16, 17, 3], [2, 18, 19, 20, 21, 3]]


def test_pack_of_too_little_text_is_empty():
    assert pack([7, 8], seq_len=6, first=2, last=3).shape == (0, 6)


def test_pack_refuses_a_length_without_room_for_text():
    with pytest.raises(ShapeError, match="seq_len 2 is not at least 3"):
        pack([7, 8], seq_len=2, first=2, last=3)


@pytest.mark.parametrize("length", [3, 4, 8, 16, 64, 129])
@pytest.mark.parametrize("share", [0.15, 0.25, 1.0])
def test_exact_count_of_every_row(length, share):
    tokens = torch.randint(SPECIAL, VOCABULARY, (37, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 0], tokens[:, -1] = 2, 3
    tokens[5:, length // 2 + 1 :] = 0
    _, labels = masked(tokens, share=share)
    ordinary = (tokens >= SPECIAL).sum(1)
    want = (ordinary * share).round().clamp(min=1).clamp(max=ordinary)
    assert torch.equal((labels != IGNORED).sum(1), want.long())


def test_special_tokens_are_never_touched_and_labels_are_the_truth():
    tokens = torch.randint(0, VOCABULARY, (64, 50), generator=torch.Generator().manual_seed(2))
    inputs, labels = masked(tokens)
    chosen = labels != IGNORED
    assert not (chosen & (tokens < SPECIAL)).any()
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])


def test_eighty_ten_ten():
    tokens = torch.randint(SPECIAL, VOCABULARY, (400, 100), generator=torch.Generator().manual_seed(3))
    inputs, labels = masked(tokens)
    chosen = labels != IGNORED
    count = int(chosen.sum())
    assert count == 400 * 25
    masks = int((inputs[chosen] == MASK).sum())
    same = int((inputs[chosen] == tokens[chosen]).sum())
    assert 0.78 < masks / count < 0.82
    assert 0.085 < same / count < 0.12
    assert int((inputs[chosen] < SPECIAL).sum()) == masks, "a random replacement is never special"


def test_the_seed_decides():
    tokens = torch.randint(SPECIAL, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(4))
    assert torch.equal(masked(tokens, seed=9)[0], masked(tokens, seed=9)[0])
    assert not torch.equal(masked(tokens, seed=9)[0], masked(tokens, seed=10)[0])


def test_a_row_without_ordinary_tokens_has_no_labels():
    _, labels = masked(torch.tensor([[2, 0, 0, 3]]))
    assert (labels == IGNORED).all()
