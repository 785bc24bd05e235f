"""Heads and neurons: found in models that others wrote, drawn, cut, and equal to the masked model."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.errors import InputError, ShrinkError
from earlybird.tickets.attention import PrunedAttention
from earlybird.tickets.units import find_units, score_units

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 60, "max_position_embeddings": 32}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TOKENS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": TOKENS, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()}
PIXELS = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


class Encoder(nn.Module):
    """torch's own layers, padding mask and head."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of norm_first, that it is not nested
            self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x, padding=None):
        hidden = self.encoder(x, src_key_padding_mask=padding)
        if padding is not None:  # what stands there depends on the kernel
            hidden = hidden.masked_fill(padding[..., None], 0.0)
        return self.head(hidden.mean(1))


class Decoder(nn.Module):
    """torch's own layer with a causal mask and cross-attention."""

    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0), 1)

    def forward(self, x, memory):
        causal = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.layers(x, memory, tgt_mask=causal, tgt_is_causal=True)


SEQUENCE = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(7) >= torch.tensor([[7], [5], [4]])
# Name to (model, inputs, number of heads of each attention, width of each feed-forward pair).
MODELS = {
    "bert": (
        lambda t: t.BertForSequenceClassification(t.BertConfig(**TEXT, **BERT)), PADDED, [4, 4], [24, 24],
    ),
    "bert_mlm": (lambda t: t.BertForMaskedLM(t.BertConfig(**TEXT, **BERT)), PADDED, [4, 4], [24, 24]),
    "roberta": (lambda t: t.RobertaModel(t.RobertaConfig(**TEXT, **BERT)), PADDED, [4, 4], [24, 24]),
    "distilbert": (
        lambda t: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(**TEXT, dim=16, n_layers=2, n_heads=4, hidden_dim=24)
        ),
        PADDED, [4, 4], [24, 24],
    ),
    "vit": (lambda t: t.ViTForImageClassification(t.ViTConfig(**IMAGE, **BERT)), PIXELS, [4, 4], [24, 24]),
    "deit": (lambda t: t.DeiTForImageClassification(t.DeiTConfig(**IMAGE, **BERT)), PIXELS, [4, 4], [24, 24]),
    "swin": (
        lambda t: t.SwinForImageClassification(
            t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        PIXELS, [2, 2, 4, 4], [32, 32, 64, 64],
    ),
    "gpt2": (
        lambda t: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=4)),
        PADDED, [4, 4], [64, 64],
    ),
    "llama": (
        lambda t: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **BERT, num_key_value_heads=2, tie_word_embeddings=True)),
        PADDED, [2, 2], [24, 24],
    ),
    "bert_decoder": (
        lambda t: t.BertModel(t.BertConfig(**TEXT, **BERT, is_decoder=True, add_cross_attention=True)),
        {**PADDED, "encoder_hidden_states": SEQUENCE}, [4, 4, 4, 4], [24, 24],
    ),
    "gpt2_decoder": (
        lambda t: t.GPT2Model(
            t.GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=1, n_head=4, add_cross_attention=True)
        ),
        {**PADDED, "encoder_hidden_states": SEQUENCE}, [4, 4], [64],
    ),
    "bart": (
        lambda t: t.BartModel(
            t.BartConfig(
                **TEXT, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
            )
        ),
        {**PADDED, "decoder_input_ids": TOKENS}, [4, 4, 4], [24, 24],
    ),
    "opt": (
        lambda t: t.OPTForCausalLM(
            t.OPTConfig(**TEXT, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, ffn_dim=24)
        ),
        PADDED, [4], [24],
    ),
    "clip": (lambda t: t.CLIPVisionModel(t.CLIPVisionConfig(**IMAGE, **BERT)), PIXELS, [4, 4], [24, 24]),
    "phi3": (lambda t: t.Phi3ForCausalLM(t.Phi3Config(**TEXT, **BERT, pad_token_id=0)), PADDED, [], [24, 24]),
    "encoder": (lambda t: Encoder(), {"x": SEQUENCE, "padding": PADDING}, [4, 4], [24, 24]),
    "decoder": (lambda t: Decoder(), {"x": SEQUENCE, "memory": SEQUENCE[:2]}, [4, 4], [24]),
    "encoder_unpadded": (lambda t: Encoder(norm_first=True, activation="gelu"), {"x": SEQUENCE}, [4, 4], [24, 24]),
    "encoder_biasless": (lambda t: Encoder(bias=False), {"x": SEQUENCE, "padding": PADDING}, [4, 4], [24, 24]),
}  # fmt: skip


def make(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name][0](transformers)
        with torch.no_grad():  # zeros and ones, as they come, would hide what is forgotten
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    return model.eval()


def flat(output):
    """Return the floating-point tensors of an output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def run(model, inputs):
    with torch.no_grad():
        return flat(model(**inputs))


def zero_columns(layer, gone):
    with torch.no_grad():
        dim = 0 if type(layer).__name__ == "Conv1D" else 1
        each = layer.weight.shape[dim] // len(gone)
        layer.weight.index_fill_(dim, gone.repeat_interleave(each).nonzero().flatten(), 0.0)


def silenced(model, ticket):
    model = copy.deepcopy(model)
    for name, mask in ticket.masks.items():
        zero_columns(model.get_submodule(find_units(model)[name].reads), ~mask)
    return model


def random_ticket(model, seed=0, **keep):
    keep = {"keep_heads": 0.5, "keep_neurons": 0.6, **keep}
    return eb.draw_units(model, **keep, score="random", generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_finds_every_head_and_neuron(name):
    found = find_units(make(name))
    assert [units.count for units in found.values() if units.kind == "head"] == MODELS[name][2]
    assert [units.count for units in found.values() if units.kind == "neuron"] == MODELS[name][3]


@pytest.mark.parametrize("name", MODELS)
def test_the_shrunk_model_equals_the_masked_one_and_trains(name):
    model, inputs = make(name), MODELS[name][1]
    ticket = random_ticket(model)
    wanted = run(silenced(model, ticket), inputs)
    whole = run(model, inputs)
    objects = dict(model.named_parameters())
    change = eb.shrink(model, ticket, inputs)
    for own, other in zip(run(model, inputs), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert any(not torch.allclose(one, other, atol=1e-3) for one, other in zip(whole, wanted))
    assert change.parameters_after < change.parameters_before
    assert all(parameter is objects[key] for key, parameter in model.named_parameters())
    left = find_units(model)
    assert {key: units.count for key, units in left.items()} == {key: kept for key, (kept, _) in ticket.widths.items()}
    model.train()
    flat(model(**inputs))[-1].sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_all_units_kept_changes_nothing(name):
    model, inputs = make(name), MODELS[name][1]
    before = run(model, inputs)
    change = eb.shrink(model, random_ticket(model, keep_heads=1, keep_neurons=1), inputs)
    assert change.parameters_after == change.parameters_before
    for own, other in zip(run(model, inputs), before, strict=True):
        assert torch.equal(own, other)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_ticket_gives_the_masked_model(data):
    name = data.draw(st.sampled_from(["gpt2", "llama", "encoder"]))
    model, inputs = make(name), MODELS[name][1]
    masks = {}
    for key, units in find_units(model).items():
        kept = data.draw(st.sets(st.integers(0, units.count - 1), min_size=1))
        masks[key] = torch.tensor([index in kept for index in range(units.count)])
    ticket = eb.Ticket(masks, {key: units.kind for key, units in find_units(model).items()})
    wanted = run(silenced(model, ticket), inputs)
    eb.shrink(model, ticket, inputs)
    for own, other in zip(run(model, inputs), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_slices_are_those_of_the_heads_and_neurons_by_hand():
    model = make("gpt2")
    attention, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masks = {"transformer.h.0.attn": torch.tensor([False, True, False, True]),
             "transformer.h.0.mlp.c_fc": torch.arange(64) % 3 == 0}  # fmt: skip
    eb.shrink(model, eb.Ticket(masks, dict(zip(masks, ("head", "neuron")))), PADDED)
    rows = [*range(4, 8), *range(12, 16)]  # of heads 1 and 3, four numbers each
    fused = [part * 16 + row for part in range(3) for row in rows]  # queries, keys, values
    assert torch.equal(attention.c_attn.weight, before["transformer.h.0.attn.c_attn.weight"][:, fused])
    assert torch.equal(attention.c_attn.bias, before["transformer.h.0.attn.c_attn.bias"][fused])
    assert torch.equal(attention.c_proj.weight, before["transformer.h.0.attn.c_proj.weight"][rows])
    assert torch.equal(attention.c_proj.bias, before["transformer.h.0.attn.c_proj.bias"])
    assert (attention.num_heads, attention.head_dim, attention.split_size) == (2, 4, 8)
    assert torch.equal(mlp.c_fc.weight, before["transformer.h.0.mlp.c_fc.weight"][:, ::3])
    assert torch.equal(mlp.c_proj.weight, before["transformer.h.0.mlp.c_proj.weight"][::3])
    assert model.transformer.h[1].attn.num_heads == 4


def test_a_shared_key_goes_with_all_its_queries():
    model = make("llama")
    attention = model.model.layers[1].self_attn
    before = {key: value.clone() for key, value in attention.state_dict().items()}
    mask = {"model.layers.1.self_attn": torch.tensor([False, True])}
    eb.shrink(model, eb.Ticket(mask, dict.fromkeys(mask, "head")), PADDED)
    assert torch.equal(attention.q_proj.weight, before["q_proj.weight"][8:])
    assert torch.equal(attention.k_proj.weight, before["k_proj.weight"][4:])
    assert torch.equal(attention.o_proj.weight, before["o_proj.weight"][:, 8:])
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["gpt2", "swin", "encoder"])
def test_the_optimizers_state_is_cut_along_and_training_goes_on(name):
    model, inputs = make(name), MODELS[name][1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        loss = sum(output.float().pow(2).mean() for output in flat(model(**inputs)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss  # an ordinary loop holds on to it

    model.train()
    loss = step()
    parameters = dict(model.named_parameters())
    state = {key: optimizer.state[value]["exp_avg"].clone() for key, value in parameters.items()}
    gradients = {key: value.grad.clone() for key, value in parameters.items()}
    ticket = random_ticket(model)
    change = eb.shrink(model, ticket, inputs, optimizer=optimizer)
    for key, parameter in parameters.items():
        for now, before in ((optimizer.state[parameter]["exp_avg"], state[key]), (parameter.grad, gradients[key])):
            assert now.shape == parameter.shape
            layer, _, _ = key.rpartition(".")
            if now.shape == before.shape:
                assert torch.equal(now, before), key
            elif layer in change.kept and now.shape[0] != before.shape[0]:
                assert torch.equal(now, before[change.kept[layer]]), key
    assert torch.isfinite(step() + loss)
    assert any(units.count < change.layers[key]["out"][0] for key, units in find_units(model).items()
               if units.kind == "neuron")  # fmt: skip


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 5}]
)
def test_torchs_own_attention_without_two_of_its_heads(options, batch_first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    query = torch.randn(2, 5, 16)
    key = torch.randn(2, 6, options.get("kdim", 16))
    value = torch.randn(2, 6, options.get("vdim", 16))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    causal = torch.ones(5, 6, dtype=torch.bool).triu(1)
    if not batch_first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    calls = [
        {}, {"key_padding_mask": padding}, {"attn_mask": causal, "key_padding_mask": padding},
        {"attn_mask": causal, "need_weights": False}, {"need_weights": True, "average_attn_weights": False},
    ]  # fmt: skip
    mask = torch.tensor([True, False, True, False])
    reference = copy.deepcopy(attention)
    zero_columns(reference.out_proj, ~mask)
    wanted = [reference(query, key, value, **call) for call in calls]
    alone = reference(query[0], key[0], value[0]) if batch_first else reference(query[:, 0], key[:, 0], value[:, 0])
    example = {"query": query, "key": key, "value": value, "need_weights": False}  # which are a mean over all heads
    eb.shrink(attention, eb.Ticket({"": mask}, {"": "head"}), example)
    assert isinstance(attention, PrunedAttention)
    assert attention.out_proj.weight.shape == (16, 8)
    for call, (output, weights) in zip(calls, wanted):
        own, own_weights = attention(query, key, value, **call)
        torch.testing.assert_close(own, output, rtol=1e-5, atol=1e-5)
        assert (own_weights is None) == (weights is None)
        if own_weights is not None and not call.get("average_attn_weights", True):
            torch.testing.assert_close(own_weights, weights[:, mask])
    own, _ = attention(query[0], key[0], value[0]) if batch_first else attention(query[:, 0], key[:, 0], value[:, 0])
    torch.testing.assert_close(own, alone[0], rtol=1e-5, atol=1e-5)


def test_fused_encoder_kernels_are_left_alone_only_where_heads_went():
    model = make("encoder")
    name = "encoder.layers.0.linear1"
    eb.shrink(model, eb.Ticket({name: torch.arange(24) < 7}, {name: "neuron"}), MODELS["encoder"][1])
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert model.encoder.use_nested_tensor
    name = "encoder.layers.1.self_attn"
    eb.shrink(model, eb.Ticket({name: torch.arange(4) < 2}, {name: "head"}), MODELS["encoder"][1])
    assert not model.encoder.use_nested_tensor
    assert type(copy.deepcopy(model).encoder.layers[1].self_attn) is PrunedAttention


def test_channels_heads_and_neurons_in_one_ticket():
    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
            self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)

        def forward(self, x):
            return self.layer(self.stem(x).flatten(2).transpose(1, 2))

    torch.manual_seed(0)
    model, x = Hybrid().eval(), torch.randn(2, 3, 8, 8)
    channels = {"stem.1": torch.arange(8) < 5}
    units = random_ticket(model)
    ticket = eb.Ticket({**units.masks, **channels}, {**units.kinds, "stem.1": "channel"})
    reference = silenced(model, units)
    with torch.no_grad():
        reference.stem[1].weight[5:] = reference.stem[1].bias[5:] = 0
    with torch.no_grad():
        wanted = reference(x)
    eb.shrink(model, ticket, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert model.stem[0].weight.shape[0] == 5
    assert model.layer.self_attn.num_heads == 2


class TestDraw:
    def test_heads_by_layer_and_neurons_over_the_network(self):
        model = make("encoder")
        scores = {}
        for name, units in find_units(model).items():
            first = name.startswith("encoder.layers.0")
            scores[name] = torch.arange(units.count) + (100.0 if first else 0.0)
        ticket = eb.draw_units(model, keep_heads=0.5, keep_neurons=0.5, scores=scores)
        assert ticket.masks["encoder.layers.0.self_attn"].tolist() == [False, False, True, True]
        assert ticket.masks["encoder.layers.1.self_attn"].tolist() == [False, False, True, True]
        assert ticket.widths["encoder.layers.0.linear1"] == (24, 24)
        assert ticket.masks["encoder.layers.1.linear1"].tolist() == [False] * 23 + [True]  # one stays
        other = eb.draw_units(
            model, keep_heads=0.5, keep_neurons=0.5, scores=scores, head_scope="network", neuron_scope="layer"
        )
        assert other.widths["encoder.layers.0.self_attn"] == (4, 4)
        assert other.widths["encoder.layers.1.self_attn"] == (1, 4)
        assert other.widths["encoder.layers.1.linear1"] == (12, 24)
        assert ticket.kinds["encoder.layers.0.self_attn"] == "head"
        assert ticket.kinds["encoder.layers.0.linear1"] == "neuron"

    def test_the_published_shares(self):
        config = transformers.BertConfig(**{**TEXT, **BERT, "num_attention_heads": 12, "hidden_size": 24})
        model = transformers.BertModel(config)
        ticket = eb.draw_units(model)
        heads = [kept for name, kept in ticket.widths.items() if ticket.kinds[name] == "head"]
        assert heads == [(8, 12), (8, 12)]  # a third of twelve goes
        neurons = [kept for name, (kept, _) in ticket.widths.items() if ticket.kinds[name] == "neuron"]
        assert sum(neurons) == round(0.6 * 48)

    def test_rounded_neurons(self):
        ticket = eb.draw_units(make("bert"), keep_neurons=0.5, round_to=8)
        assert all(kept % 8 == 0 for name, (kept, _) in ticket.widths.items() if ticket.kinds[name] == "neuron")

    def test_one_kind_alone(self):
        model = make("gpt2")
        assert set(eb.draw_units(model, keep_heads=1.0).kinds.values()) == {"neuron"}
        assert set(eb.draw_units(model, keep_neurons=1.0).kinds.values()) == {"head"}

    def test_magnitude_by_hand(self):
        model = make("gpt2")
        mlp = model.transformer.h[0].mlp
        with torch.no_grad():
            for weight in (mlp.c_fc.weight, mlp.c_proj.weight):
                weight.fill_(1.0)
            mlp.c_fc.weight[:, 5] = 2.0  # sixteen inputs, as many outputs
        score = score_units(model, "magnitude")["transformer.h.0.mlp.c_fc"]
        assert score[5] / score[0] == pytest.approx(((4 + 1) / 2) ** 0.5)

    def test_taylor_is_the_gradient_of_a_factor_on_the_unit(self):
        model = make("llama")
        block = model.model.layers[0]
        heads, neurons = torch.ones(2, requires_grad=True), torch.ones(24, requires_grad=True)
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, args: args[0] * heads.repeat_interleave(8))
        block.mlp.down_proj.register_forward_pre_hook(lambda m, args: args[0] * neurons)
        functional.cross_entropy(model(TOKENS).logits.flatten(0, 1), TOKENS.flatten()).backward()
        scores = score_units(model, "taylor")
        for path, factor in (("model.layers.0.self_attn", heads), ("model.layers.0.mlp.gate_proj", neurons)):
            wanted = factor.grad.abs() / factor.grad.norm()
            torch.testing.assert_close(scores[path], wanted, rtol=1e-4, atol=1e-6)

    def test_random_needs_a_generator_and_repeats_with_it(self):
        model = make("bert")
        assert random_ticket(model, 3) == random_ticket(model, 3) != random_ticket(model, 4)
        with pytest.raises(InputError, match="generator"):
            eb.draw_units(model, score="random")


class TestRefusals:
    """Bad input is named, and leaves model and optimizer as they were."""

    @pytest.mark.parametrize(
        ("masks", "kind", "said"),
        [
            ({"bert.encoder.layer.0.attentions": torch.ones(4, dtype=torch.bool)}, "head", "did you mean"),
            ({"bert.encoder.layer.0.attention": torch.arange(3) > 0}, "head", "3 heads .* the model 4"),
            ({"bert.encoder.layer.0.attention": torch.zeros(4, dtype=torch.bool)}, "head", "removes every head"),
            ({"bert.encoder.layer.0.attention": torch.arange(24) > 0}, "neuron", "does not have"),
            ({"bert.encoder.layer.0.attention": torch.arange(4) > 0}, "patch", "'channel', 'head' or 'neuron'"),
        ],
    )
    def test_tickets_that_do_not_fit(self, masks, kind, said):
        model = make("bert")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(InputError, match=said):
            eb.shrink(model, eb.Ticket(masks, dict.fromkeys(masks, kind)), PADDED)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_model_without_any(self):
        with pytest.raises(InputError, match="no attention heads"):
            eb.draw_units(nn.Linear(3, 3))

    @pytest.mark.parametrize(
        "wrong", [{"keep_heads": 0}, {"keep_neurons": 1.5}, {"head_scope": "model"}, {"round_to": 0}]
    )
    def test_options_out_of_range(self, wrong):
        with pytest.raises(InputError, match=next(iter(wrong))):
            eb.draw_units(make("bert"), **wrong)

    def test_scores_that_do_not_fit(self):
        model, name = make("bert"), "bert.encoder.layer.0.attention"
        for scores in ({}, {name: torch.ones(3)}, {name: torch.full((4,), torch.nan)}, {"elsewhere": torch.ones(4)}):
            with pytest.raises(InputError, match="scores"):
                eb.draw_units(model, scores=scores)

    def test_taylor_without_gradients(self):
        with pytest.raises(InputError, match="has no gradient"):
            eb.draw_units(make("bert"), score="taylor")

    def test_what_stands_between_a_pair_is_found_out_and_taken_back(self):
        class Between(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 4)

            def forward(self, x):
                return self.fc2(self.fc1(x).softmax(-1))

        model, x = Between(), torch.randn(2, 8)
        optimizer = torch.optim.Adam(model.parameters())
        model(x).sum().backward()
        optimizer.step()
        before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ShrinkError, match=r"layer 'fc2'|the output"):
            eb.shrink(model, eb.Ticket({"fc1": torch.arange(12) < 5}, {"fc1": "neuron"}), x, optimizer=optimizer)
        assert model.fc1.out_features == 12
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert str(optimizer.state_dict()) == str(states)

    def test_optimizer_state_of_another_shape(self):
        model = make("bert")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        weight = model.bert.encoder.layer[0].intermediate.dense.weight
        optimizer.state[weight]["rows"] = torch.zeros(24)
        with pytest.raises(ShrinkError, match="'rows'"):
            eb.shrink(model, random_ticket(model), PADDED, optimizer=optimizer)
        assert weight.shape == (24, 16)
