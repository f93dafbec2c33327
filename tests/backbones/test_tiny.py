"""The shipped `tiny` backbone loads offline, is a small DeBERTa-v2, and has learned the grammar."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import diffora.tasks.embedded.paraphrase as paraphrase
from diffora.hub import EMBEDDED

KINDS = {
    "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj",
    "attention.output.dense", "intermediate.dense", "output.dense",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def encoder():
    return AutoModel.from_pretrained(EMBEDDED).eval()


def test_it_is_small_and_complete():
    files = {f.name for f in EMBEDDED.iterdir() if f.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files
    assert sum(f.stat().st_size for f in EMBEDDED.rglob("*") if f.is_file()) <= 4 * 2**20


def test_it_has_the_architecture_of_deberta_v3():
    config = json.loads((EMBEDDED / "config.json").read_text())
    assert config["model_type"] == "deberta-v2"
    assert config["relative_attention"] and config["share_att_key"] and not config["position_biased_input"]
    assert config["position_buckets"] > 0 and config["type_vocab_size"] == 0 and config["norm_rel_ebd"] == "layer_norm"
    assert set(config["pos_att_type"]) == {"c2p", "p2c"}


def test_only_pooler_and_classifier_are_new():
    model, info = AutoModelForSequenceClassification.from_pretrained(EMBEDDED, num_labels=2, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooler", "classifier"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_the_candidate_modules_are_six_linears_per_layer(encoder):
    linears = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)]
    layers = encoder.config.num_hidden_layers
    assert set(linears) == {f"encoder.layer.{i}.{kind}" for i in range(layers) for kind in KINDS}
    assert len(linears) == 6 * layers


def test_the_tokenizer_is_word_level_and_knows_every_word(tokenizer, encoder):
    assert tokenizer.model_max_length == 64
    assert len(tokenizer) == encoder.config.vocab_size == len(paraphrase.VOCABULARY) + 5
    assert tokenizer.pad_token_id == encoder.config.pad_token_id == 0
    special = (tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
    assert special == ("[UNK]", "[CLS]", "[SEP]", "[MASK]")
    rows = paraphrase.generate(300, seed=11)
    ids = tokenizer(rows["sentence1"], rows["sentence2"])["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer("the zeppelin")["input_ids"].count(tokenizer.unk_token_id) == 1
    words = tokenizer.convert_ids_to_tokens(tokenizer("the cook left", "the nurse won")["input_ids"])
    assert " ".join(words) == "[CLS] the cook left [SEP] the nurse won [SEP]"


def test_padding_changes_nothing(tokenizer, encoder):
    pair = ("the tall cook thanked the nurse", "the nurse was thanked by the tall chef")
    short, padded = tokenizer(*pair, return_tensors="pt"), tokenizer(*pair, padding="max_length", return_tensors="pt")
    assert padded["input_ids"].shape[1] == 64 > short["input_ids"].shape[1]
    assert set(short) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        a, b = encoder(**short).last_hidden_state, encoder(**padded).last_hidden_state
    torch.testing.assert_close(b[:, : a.shape[1]], a, atol=1e-4, rtol=1e-4)


def _hidden(encoder, tokenizer, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """(pairs, length, hidden); every pair has the same length."""
    with torch.no_grad():
        return encoder(**tokenizer([a for a, _ in pairs], [b for _, b in pairs], return_tensors="pt")).last_hidden_state


def _knows_the_agent(encoder, tokenizer) -> float:
    """How often the masked agent of a passive sentence is most similar to the right person, by hidden states.

    All the second sentences are "the [MASK] was helped by the [MASK]". The last mask stands for A after "A helped P"
    and after "P was helped by A", and for P after "P helped A", whose people come in the order of the passive sentence.
    """
    people, verbs = [row[0] for row in paraphrase.PEOPLE], [paraphrase.past(row[0]) for row in paraphrase.ACTS]
    right = 0
    for i, a in enumerate(people):
        p, verb = people[(i + 7) % len(people)], verbs[i % len(verbs)]
        asked = f"the [MASK] was {verb} by the [MASK]"
        told = (f"the {p} was {verb} by the {a}", f"the {a} {verb} the {p}", f"the {p} {verb} the {a}")
        passive, active, other = (_hidden(encoder, tokenizer, [(one, asked)])[0, -2] for one in told)
        right += int(torch.cosine_similarity(passive, active, dim=0) > torch.cosine_similarity(passive, other, dim=0))
    return right / len(people)


def test_it_has_learned_who_did_what_to_whom(tokenizer, encoder):
    assert _knows_the_agent(encoder, tokenizer) > 0.85


def test_an_untrained_model_of_the_same_shape_has_not(tokenizer, encoder):
    torch.manual_seed(0)
    assert _knows_the_agent(type(encoder)(encoder.config).eval(), tokenizer) < 0.75


def test_hidden_states_depend_on_the_context(tokenizer, encoder):
    one, two = "the cook thanked the nurse", "the nurse thanked the cook"
    states = _hidden(encoder, tokenizer, [(one, one), (two, one), (one, one)])
    same_word = states[:, 8]  # "cook" of the second sentence; only the first sentence differs
    assert torch.allclose(same_word[0], same_word[2], atol=1e-5)
    assert torch.cosine_similarity(same_word[0], same_word[1], dim=0) < 0.99
