"""Shrunk Hugging Face models as folders: saved, loaded in a fresh process, generated with."""

import json
import subprocess
import sys

import pytest
import torch

import earlybird as eb
from earlybird.errors import InputError
from earlybird.tickets.units import find_units
from tests.tickets.test_units import MODELS, PADDED, TOKENS, make, random_ticket, run, silenced

transformers = pytest.importorskip("transformers")
hf_files = pytest.importorskip("earlybird.integrations.hf_files")

FRESH = """
import sys, torch
from earlybird.integrations.hf_files import load
for folder in sys.argv[1:]:
    model = load(folder)
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model(**inputs)[0], folder + "/output.pt")
"""
NAMES = ("bert", "distilbert", "swin", "llama")


def test_a_fresh_process_gets_the_shrunk_models_back(tmp_path):
    wanted = {}
    for name in NAMES:
        model, inputs = make(name), MODELS[name][1]
        eb.shrink(model, random_ticket(model), inputs)
        model.save_pretrained(tmp_path / name)
        torch.save(inputs, tmp_path / name / "inputs.pt")
        wanted[name] = run(model, inputs)[0]
    folders = [str(tmp_path / name) for name in NAMES]
    subprocess.run([sys.executable, "-c", FRESH, *folders], check=True, capture_output=True)
    for name, output in wanted.items():
        torch.testing.assert_close(torch.load(tmp_path / name / "output.pt", weights_only=True), output)


def test_the_config_says_what_is_left_and_what_it_was_built_with(tmp_path):
    model = make("bert")
    name = "bert.encoder.layer.1.attention"
    mask = torch.tensor([True, False, True, True])
    eb.shrink(model, eb.Ticket({name: mask}, {name: "head"}), PADDED)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["earlybird_ticket"] == {name: {"kind": "head", "kept": 3, "of": 4, "mask": "1011"}}
    assert config["num_attention_heads"] == 4
    assert hf_files.ticket_of(transformers.AutoConfig.from_pretrained(tmp_path)).masks[name].tolist() == mask.tolist()


def test_shrunk_twice_is_one_ticket_over_the_first_model(tmp_path):
    model = make("gpt2")
    name = "transformer.h.0.attn"
    eb.shrink(model, eb.Ticket({name: torch.tensor([True, False, True, True])}, {name: "head"}), PADDED)
    eb.shrink(model, eb.Ticket({name: torch.tensor([False, True, True])}, {name: "head"}), PADDED)
    assert model.config.earlybird_ticket[name]["mask"] == "0011"
    model.save_pretrained(tmp_path)
    again = hf_files.load(tmp_path)
    torch.testing.assert_close(run(again, PADDED), run(model, PADDED))


def test_loaded_with_another_head_on_top_and_as_the_plain_class(tmp_path):
    model = make("bert")
    eb.shrink(model, random_ticket(model), PADDED)
    model.save_pretrained(tmp_path)
    bare = hf_files.load(tmp_path, transformers.BertModel)
    assert type(bare) is transformers.BertModel
    torch.testing.assert_close(run(bare, PADDED)[0], run(model.bert, PADDED)[0])
    bare.save_pretrained(tmp_path / "bare")
    other = hf_files.load(tmp_path / "bare", transformers.BertForTokenClassification, num_labels=5)
    assert other.classifier.out_features == 5
    torch.testing.assert_close(run(other.bert, PADDED)[0], run(bare, PADDED)[0])


def test_a_model_inside_another_module():
    outer = torch.nn.ModuleDict({"text": make("bert")})
    outer.forward = lambda **inputs: outer["text"](**inputs)
    eb.shrink(outer, random_ticket(outer), PADDED)
    assert "bert.encoder.layer.0.attention" in outer["text"].config.earlybird_ticket


def test_a_folder_that_was_never_shrunk_and_what_cannot_be_loaded(tmp_path):
    model = make("bert")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(hf_files.load(tmp_path), PADDED), run(model, PADDED))
    with pytest.raises(InputError, match="AutoModel"):
        hf_files.load(tmp_path, transformers.AutoModel)
    config = json.loads((tmp_path / "config.json").read_text())
    damaged = {"a": {"kind": "head"}}, {"a": {"kind": "head", "mask": "01"}}
    for wrong, said in zip(damaged, ("cannot be read", "layer 'a'")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "earlybird_ticket": wrong}))
        with pytest.raises(InputError, match=said):
            hf_files.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForNothing"]}))
    with pytest.raises(InputError, match="BertForNothing"):
        hf_files.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "keep", "said"),
    [
        ("llama", {"keep_heads": 0.5}, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 14}),
        ("bert", {"keep_heads": 1.0}, {"num_attention_heads": 4, "intermediate_size": 14}),
        ("distilbert", {"keep_heads": 1.0}, {"n_heads": 4, "hidden_dim": 14}),
        ("gpt2", {"keep_heads": 1.0}, {"n_head": 4, "n_inner": 38}),
    ],
)
def test_layers_that_keep_equally_many_make_a_plain_model(name, keep, said, tmp_path):
    model, inputs = make(name), MODELS[name][1]
    eb.shrink(model, random_ticket(model, neuron_scope="layer", **keep), inputs)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert said.items() <= config.items()
    assert "earlybird_ticket" not in config
    again = type(model).from_pretrained(tmp_path)
    for own, other in zip(run(again, inputs), run(model, inputs), strict=True):
        torch.testing.assert_close(own, other)


def test_heads_of_a_config_without_their_size_need_the_ticket(tmp_path):
    model = make("bert")
    eb.shrink(model, random_ticket(model, neuron_scope="layer"), PADDED)
    assert model.config.num_attention_heads == 4
    assert model.config.intermediate_size == 24
    assert len(model.config.earlybird_ticket) == 4


def test_plain_from_pretrained_refuses_the_folder(tmp_path):
    model = make("bert")
    eb.shrink(model, random_ticket(model), PADDED)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_generation_with_a_cache_equals_the_masked_models(name, tmp_path):
    model = make(name)
    ticket = random_ticket(model)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = silenced(model, ticket).generate(TOKENS, **options)
    eb.shrink(model, ticket, PADDED)
    assert torch.equal(model.generate(TOKENS, use_cache=True, **options), wanted)
    assert torch.equal(model.generate(TOKENS, use_cache=False, **options), wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(hf_files.load(tmp_path).generate(TOKENS, **options), wanted)


def test_tied_embeddings_stay_tied_and_no_optimizer_state_is_lost(tmp_path):
    model = make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    eb.shrink(model, random_ticket(model), PADDED, optimizer=optimizer)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = hf_files.load(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert find_units(again).keys() == find_units(model).keys()
