import torch
from model_samples import tiny_med, tiny_pixels, tiny_texts

from blip_pipelines.models import packing
from blip_pipelines.models.packing import Rows


def test_packed_rows_are_the_words_in_order():
    ids, mask = tiny_texts((5, 3))
    rows = Rows.of(ids, mask)
    assert torch.equal(rows.pack(ids), ids[mask])
    assert torch.equal(rows.unpack(ids[mask]), ids * mask)
    assert torch.equal(rows.first(ids[mask]), ids[:, 0])


def test_without_a_mask_every_token_is_a_row():
    ids, _ = tiny_texts((5, 3))
    rows = Rows.of(ids, None)
    assert torch.equal(rows.pack(ids), ids.flatten())
    assert torch.equal(rows.unpack(ids.flatten()), ids)
    assert torch.equal(rows.first(ids.flatten()), ids[:, 0])


def test_packing_and_unpacking_have_the_gradients_of_plain_indexing():
    ids, mask = tiny_texts((5, 3))
    rows = Rows.of(ids, mask)
    states = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rows.pack, states)
    assert torch.autograd.gradcheck(rows.unpack, packed)
    assert torch.autograd.gradcheck(rows.first, packed)


def test_packed_and_padded_passes_give_the_same_outputs_and_gradients():
    ids, mask = tiny_texts()
    results = []
    for packs in (True, False):
        med = tiny_med()
        image = med.project_image(med.encode_image(tiny_pixels()))
        rows = Rows.of(ids, mask if packs else None)
        visible = mask[:, None, None]
        first = med.text_encoder(ids, rows, visible, image, first_only=True)
        causal = visible & torch.ones(7, 7, dtype=torch.bool).tril()
        states = rows.unpack(med.text_decoder.bert(ids, rows, causal, image))[mask]
        (first.square().sum() + states.square().sum()).backward()
        gradients = {name: p.grad for name, p in med.named_parameters() if p.grad is not None}
        results.append((first, states, gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_in_half_precision_padding_fills_rows_up_to_one_of_few_numbers():
    ids = torch.arange(1, 601).view(30, 20)
    for lengths in (torch.arange(30) % 16 + 4, torch.full((30,), 20) - (torch.arange(30) == 3).long()):
        mask = torch.arange(20) < lengths[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            rows = Rows.of(ids, mask)
        words_R = rows.words_R
        assert len(words_R) == min(-(-int(mask.sum()) // 64) * 64, 600)
        assert (words_R.diff() > 0).all() and torch.isin(mask.flatten().nonzero()[:, 0], words_R).all()
        assert torch.equal(rows.unpack(rows.pack(ids))[mask], ids[mask])
        assert torch.equal(rows.first(rows.pack(ids)), ids[:, 0])


def test_padding_that_travels_along_changes_no_word(monkeypatch):
    ids, mask = tiny_texts()
    monkeypatch.setattr(packing, "FEW", int(mask.sum()) + 2)
    states = []
    for packs in (True, False):
        med = tiny_med()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            rows = Rows.of(ids, mask if packs else None)
            assert rows.words_R is None or len(rows.words_R) == mask.sum() + 2 < mask.numel()
            image = med.project_image(med.encode_image(tiny_pixels()))
            states.append(rows.unpack(med.text_decoder.bert(ids, rows, mask[:, None, None], image))[mask].float())
    torch.testing.assert_close(*states, atol=2e-2, rtol=0)
