"""The models' behaviour: padding, heads, losses, training, saving, and their place in Transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast, pipeline

from fastff import FFF, ShapeError, ops
from fastff.conditional import parse_layer
from fastff.models import (
    UltraFastBertForCausalLM,
    UltraFastBertForMaskedLM,
    UltraFastBertForSequenceClassification,
    UltraFastBertModel,
)
from fastff.models.encoder.modeling import sinusoids
from fastff.ops import conditional_interface
from model_cases import FEEDFORWARDS, small_batch, small_config


def build(model_class=UltraFastBertForMaskedLM, **changes):
    torch.manual_seed(0)
    return model_class(small_config(**changes)).eval()


def shaken(model):
    """Move every parameter off its initial value, so that no term is neutral."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FEEDFORWARDS)
def test_padding_changes_nothing(kind, attention):
    model = build(feedforward=FEEDFORWARDS[kind], attn_implementation=attention)
    input_ids, attention_mask, _ = small_batch()
    padded = model(input_ids, attention_mask).logits
    for row, length in enumerate(attention_mask.sum(1)):
        alone = model(input_ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(padded[row, :length], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_padding_alone_disturbs_no_other(attention):
    model = build(attn_implementation=attention)
    input_ids, attention_mask, _ = small_batch()
    want = model(input_ids, attention_mask).logits
    attention_mask[1] = 0
    got = model(input_ids, attention_mask).logits
    assert got.isfinite().all()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


def test_sdpa_agrees_with_eager():
    model = shaken(build(attention_bias=True, decoder_bias=True))
    input_ids, attention_mask, _ = small_batch()
    want = model(input_ids, attention_mask).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(input_ids, attention_mask).logits, want)


def test_a_mask_without_padding_equals_no_mask():
    model = build()
    input_ids, _, _ = small_batch()
    assert torch.equal(model(input_ids, torch.ones_like(input_ids)).logits, model(input_ids).logits)


@pytest.mark.parametrize(
    ("qkv_bias", "attention_bias", "expected"), [(None, True, True), (True, False, True), (None, False, False)]
)
def test_biases_of_the_projections(qkv_bias, attention_bias, expected):
    attention = build(qkv_bias=qkv_bias, attention_bias=attention_bias).encoder.layers[0].attention
    assert (attention.qkv.bias is not None) == expected
    assert (attention.output.bias is not None) == attention_bias


def test_positions_are_scaled_sinusoids():
    model = build()
    table = sinusoids(24, 16)
    assert table[3, 4].item() == pytest.approx(torch.tensor(3 / 10000 ** (4 / 16)).sin().item(), abs=1e-6)
    assert table[3, 5].item() == pytest.approx(torch.tensor(3 / 10000 ** (4 / 16)).cos().item(), abs=1e-6)
    assert torch.equal(model.encoder.embeddings.position_table, table)
    assert model.encoder.embeddings.position_scale.item() == pytest.approx(16**-0.5)


def test_outputs_are_those_of_transformers():
    model = build(attn_implementation="eager", output_hidden_states=True)
    input_ids, attention_mask, labels = small_batch()
    output = model(input_ids, attention_mask, labels=labels, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 10, 16)] * 3
    assert torch.equal(output.hidden_states[0], model.encoder.embeddings(model.get_input_embeddings()(input_ids)))
    assert torch.equal(model.decoder(output.hidden_states[-1]), output.logits)
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 2, 10, 10)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 2, 10))
    as_tuple = model(input_ids, attention_mask, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)


def test_embeddings_can_be_given():
    model = build()
    input_ids, attention_mask, _ = small_batch()
    words = model.get_input_embeddings()(input_ids)
    got = model(inputs_embeds=words, attention_mask=attention_mask).logits
    assert torch.equal(got, model(input_ids, attention_mask).logits)


def test_bad_inputs_are_named():
    model = build()
    input_ids, attention_mask, _ = small_batch()
    with pytest.raises(ShapeError, match=r"attention_mask \(3, 9\) is not \(3, 10\)"):
        model(input_ids, attention_mask[:, 1:])
    with pytest.raises(ShapeError, match="length 30 is more than max_position_embeddings 24"):
        model(input_ids.repeat(1, 3))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="needs attn_implementation 'eager', got 'sdpa'"):
        model(input_ids, output_attentions=True)
    model.config.pooler = "max"
    with pytest.raises(ValueError, match="pooler 'max' is not one of"):
        UltraFastBertForSequenceClassification(model.config)


@pytest.mark.parametrize(("pooler", "same"), [("masked_avg", True), ("zero_index", True), ("avg", False)])
def test_poolers_and_padding(pooler, same):
    model = build(UltraFastBertForSequenceClassification, pooler=pooler, num_labels=3)
    input_ids, attention_mask, _ = small_batch()
    padded = model(input_ids, attention_mask).logits[1]
    alone = model(input_ids[1:2, :7]).logits[0]
    assert torch.allclose(padded, alone, rtol=1e-5, atol=1e-6) == same


def test_pooler_arithmetic():
    model = shaken(build(UltraFastBertForSequenceClassification, pooler="avg", num_labels=3))
    input_ids, attention_mask, _ = small_batch()
    pooled = model.encoder(input_ids, attention_mask).last_hidden_state.mean(1)
    want = model.classifier(torch.tanh(model.pooler.dense(pooled)))
    assert torch.equal(model(input_ids, attention_mask).logits, want)


@pytest.mark.parametrize(
    ("num_labels", "labels", "loss"),
    [
        (1, torch.tensor([0.5, -1.0, 2.0]), torch.nn.functional.mse_loss),
        (4, torch.tensor([0, 3, 1]), torch.nn.functional.cross_entropy),
        (2, torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), torch.nn.functional.binary_cross_entropy_with_logits),
    ],
)
def test_losses_of_the_classifier(num_labels, labels, loss):
    model = build(UltraFastBertForSequenceClassification, num_labels=num_labels)
    input_ids, attention_mask, _ = small_batch()
    output = model(input_ids, attention_mask, labels=labels)
    assert output.logits.shape == (3, num_labels)
    torch.testing.assert_close(output.loss, loss(output.logits.squeeze(-1), labels))


def test_loss_of_the_masked_language_model():
    model = build()
    input_ids, attention_mask, labels = small_batch()
    output = model(input_ids, attention_mask, labels=labels)
    chosen = labels != -100
    want = torch.nn.functional.cross_entropy(output.logits[chosen], labels[chosen])
    torch.testing.assert_close(output.loss, want)
    halved = model(input_ids, attention_mask, labels=labels, num_items_in_batch=2 * chosen.sum()).loss
    torch.testing.assert_close(halved, want / 2)


def test_sparse_prediction_has_the_same_loss_and_gradients():
    dense = build().train()
    sparse = copy.deepcopy(dense)
    sparse.config.sparse_prediction = True
    input_ids, attention_mask, labels = small_batch()
    for model in (dense, sparse):
        output = model(input_ids, attention_mask, labels=labels)
        output.loss.backward()
    assert output.logits.shape == ((labels != -100).sum(), 50)
    for want, got in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-7)
    assert sparse.eval()(input_ids, attention_mask, labels=labels).logits.shape == (3, 10, 50)


@pytest.mark.parametrize("kind", FEEDFORWARDS)
def test_training_reduces_the_loss(kind):
    model = build(feedforward=FEEDFORWARDS[kind], sparse_prediction=True).train()
    input_ids, attention_mask, labels = small_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids, attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_acts_in_training_only():
    model = build(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, embedding_dropout=0.5)
    input_ids, attention_mask, _ = small_batch()
    assert torch.equal(model(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)
    model.train()
    assert not torch.equal(model(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)


def test_gradient_checkpointing_changes_no_gradient():
    plain = build().train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable()
    calls = []
    saving.encoder.layers[1].feedforward.register_forward_pre_hook(lambda *_: calls.append(1))
    input_ids, attention_mask, labels = small_batch()
    for model in (plain, saving):
        model(input_ids, attention_mask, labels=labels).loss.backward()
    assert len(calls) == 2  # once forward, once more for the gradient
    for want, got in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("kind", ["fff", "dense"])
def test_the_model_compiles_in_one_graph(kind):
    model = build(feedforward=FEEDFORWARDS[kind])
    input_ids, attention_mask, _ = small_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(input_ids, attention_mask).logits
        torch.testing.assert_close(got, model(input_ids, attention_mask).logits)


@pytest.mark.parametrize("name", ["flat-4x3-top2", "1x2-leaf3-paths2", "pk-4x3-top2"])
def test_a_model_with_layers_behind_routers_learns_in_one_graph(name, monkeypatch):
    monkeypatch.setattr(conditional_interface, "_unavailable", {})  # as in a new process: the question imports
    monkeypatch.setattr(conditional_interface, "_modules", {})
    plain = build(feedforward=parse_layer(name)).train()
    model = copy.deepcopy(plain)
    input_ids, attention_mask, labels = small_batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for call in (plain, compiled):
        call(input_ids, attention_mask, labels=labels).loss.backward()
    for want, got in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_initialisation():
    tree = {"kind": "fff", "depth": 7, "bias": True}
    scaled = build(hidden_size=64, feedforward=tree, feedforward_init="fan_in")
    assert scaled.encoder.layers[0].feedforward.w_in.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert scaled.encoder.layers[0].feedforward.w_out.std().item() == pytest.approx(8**-0.5, rel=0.05)
    published = build(hidden_size=64, feedforward=tree)
    layer = published.encoder.layers[0]
    for weight in (layer.feedforward.w_in, layer.feedforward.w_out, layer.attention.qkv.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layer.feedforward.b_in.any()
    assert not published.get_input_embeddings().weight[0].any()


def test_the_control_without_feedforward_has_none():
    model = build(feedforward=[FEEDFORWARDS["none"], FEEDFORWARDS["fff"]])
    assert model.encoder.layers[0].feedforward is None
    assert not [name for name in model.state_dict() if name.startswith("encoder.layers.0.feedforward")]
    assert isinstance(model.encoder.layers[1].feedforward, FFF)


def test_the_decoder_is_tied_unless_told_otherwise():
    tied, untied = build(), build(tie_word_embeddings=False)
    assert tied.decoder.weight is tied.get_input_embeddings().weight
    assert untied.decoder.weight is not untied.get_input_embeddings().weight
    tied.resize_token_embeddings(60)
    assert tied.decoder.weight is tied.get_input_embeddings().weight
    assert (tied.config.vocab_size, tied.decoder.weight.shape) == (60, (60, 16))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FEEDFORWARDS)
def test_save_and_load(tmp_path, kind, tied):
    model = build(feedforward=FEEDFORWARDS[kind], tie_word_embeddings=tied)
    input_ids, attention_mask, _ = small_batch()
    model.save_pretrained(tmp_path)
    assert ("decoder.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is UltraFastBertForMaskedLM
    assert torch.equal(loaded(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)
    assert (loaded.decoder.weight is loaded.get_input_embeddings().weight) == tied
    for layer in loaded.modules():
        if isinstance(layer, FFF):
            assert not layer.usage().counts.any()  # a buffer that no file holds


def test_load_in_half_precision(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = UltraFastBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    input_ids, attention_mask, _ = small_batch()
    logits = loaded(input_ids, attention_mask).logits
    assert logits.dtype == torch.bfloat16
    assert loaded.encoder.layers[0].feedforward.w_in.dtype == torch.bfloat16
    assert (logits.float() - model(input_ids, attention_mask).logits).abs().mean() < 0.05


def test_heads_are_swapped_when_a_checkpoint_is_loaded_for_another_task(tmp_path):
    language_model = build()
    language_model.save_pretrained(tmp_path / "lm")
    classifier = UltraFastBertForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=5)
    assert classifier.classifier.weight.shape == (5, 12)
    assert classifier.classifier.weight.std() > 0
    classifier.save_pretrained(tmp_path / "classifier")
    back = UltraFastBertForMaskedLM.from_pretrained(tmp_path / "classifier")
    encoder = AutoModel.from_pretrained(tmp_path / "classifier")
    assert type(encoder) is UltraFastBertModel
    encoder.save_pretrained(tmp_path / "encoder")
    from_encoder = UltraFastBertForMaskedLM.from_pretrained(tmp_path / "encoder")
    input_ids, attention_mask, _ = small_batch()
    want = language_model(input_ids, attention_mask).logits
    for model in (back, from_encoder):
        assert torch.equal(model(input_ids, attention_mask).logits, want)


@pytest.mark.parametrize("backend", ops.available_backends())
def test_usage_counts_the_tokens_of_training(backend):
    model = build(feedforward={"kind": "fff", "depth": 3, "trees": 2}).train()
    input_ids, attention_mask, _ = small_batch()
    with ops.use_backend(backend):
        model(input_ids, attention_mask)
    counts = model.encoder.layers[0].feedforward.usage().counts
    assert counts.shape == (2, 8)
    assert counts.sum(1).tolist() == [30, 30]


def test_fill_mask_pipeline(tmp_path):
    words = ["[PAD]", "[UNK]", "[MASK]", "the", "cat", "sat", "on", "a", "mat"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", model_max_length=24
    )
    model = build(vocab_size=len(words)).train()
    sentence = fast("the cat sat on a mat", return_tensors="pt")
    masked = sentence["input_ids"].masked_fill(sentence["input_ids"] == words.index("cat"), words.index("[MASK]"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(masked, labels=sentence["input_ids"]).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path))
    best = fill("the [MASK] sat on a mat")[0]
    assert best["token_str"] == "cat"
    assert best["score"] > 0.5
    assert len(fill(["the [MASK]", "a cat sat on the [MASK]"])) == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_causal_model_does_not_see_what_comes(attention):
    model = shaken(build(UltraFastBertForCausalLM, is_decoder=True, attn_implementation=attention))
    input_ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(input_ids).logits
    input_ids[:, 5] = 7
    after = model(input_ids).logits
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.equal(after[:, 6:], before[:, 6:])
    loss = model(input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, F.cross_entropy(after[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()))


@pytest.mark.parametrize("model_class", [UltraFastBertForCausalLM, UltraFastBertForMaskedLM])
def test_without_padding_no_mask_is_made(monkeypatch, model_class):
    for name in ("create_causal_mask", "create_bidirectional_mask"):
        monkeypatch.setattr(f"fastff.models.encoder.modeling.{name}", lambda *_: pytest.fail("made a mask"))
    causal = model_class is UltraFastBertForCausalLM
    input_ids, _, _ = small_batch()
    build(model_class, is_decoder=causal, attn_implementation="sdpa")(input_ids)
    with pytest.raises(pytest.fail.Exception, match="made a mask"):  # eager attention knows of no direction
        build(model_class, is_decoder=causal, attn_implementation="eager")(input_ids)


def test_a_causal_model_and_a_masked_one_are_not_taken_for_each_other(tmp_path):
    with pytest.raises(ValueError, match="UltraFastBertForCausalLM needs True"):
        build(UltraFastBertForCausalLM)
    with pytest.raises(ValueError, match="a masked-word model needs False"):
        build(is_decoder=True)
    model = build(UltraFastBertForCausalLM, is_decoder=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    input_ids = torch.arange(1, 9)[None]
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
