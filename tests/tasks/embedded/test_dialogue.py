"""The generated conversations. A second implementation reads the sentences and checks the answers."""

import json
import random
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from diffora.backbones.load import load_backbone
from diffora.hub import EMBEDDED
from diffora.loop.predict import predict
from diffora.run.experiment import run
from diffora.settings.read import model_of
from diffora.tasks.base import Split, get_task
from diffora.tasks.embedded import dialogue
from diffora.tasks.embedded.dialogue import VOCABULARY, converse, splits
from diffora.tasks.embedded.paraphrase import ACTS, past

VERBS = {word: verb for row in ACTS for verb in row for word in (verb, past(verb))}
ADVERBS = r"((?:at|on) \w+|recently|lately|yesterday)"


def read(sentence: str) -> tuple:
    """(who, verb, whom, time, whether it holds, voice) of a sentence."""
    text = re.sub(rf" {ADVERBS}$", "", sentence)
    time = sentence[len(text) :].strip()
    if match := re.fullmatch(r"(the .+) was (not )?(\w+) by (the .+)", text):
        whom, no, verb, who = match.groups()
        return who, VERBS[verb], whom, time, no is None, "passive"
    if match := re.fullmatch(r"(the .+?) did not (\w+) (the .+)", text):
        return match[1], VERBS[match[2]], match[3], time, False, "active"
    verb = next(word for word in text.split() if word in VERBS)
    who, whom = text.split(f" {verb} ")
    return who, VERBS[verb], whom, time, True, "active"


@pytest.mark.parametrize("seed", range(300))
def test_answers_are_right(seed):
    turns = converse(random.Random(seed))
    told, _, first = turns[0]["content"].partition(" . ")
    who, verb, whom, time, holds, voice = read(told)
    for asked, answer in zip([first, *(t["content"] for t in turns[2::2])], turns[1::2], strict=True):
        said = answer["content"]
        if asked.startswith("who "):
            assert said == who and asked.endswith(f"{whom} ?") and VERBS[asked.split()[1 if holds else 3]] == verb
        elif asked.startswith("whom "):
            assert said == whom and who in asked and ("not" in asked.split()) == (not holds)
        elif asked.startswith("say it in the "):
            assert asked.split()[-2] != voice
            assert read(said) == (who, verb, whom, time, holds, asked.split()[-2])
        else:
            assert asked == "say that it is not so ."
            assert read(said) == (who, verb, whom, time, not holds, voice)
    assert {word for turn in turns for word in turn["content"].split()} <= set(VOCABULARY)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)


def test_no_sentence_is_used_twice_and_the_seed_decides():
    made = splits(200, 100, seed=0)
    told = [turns[0]["content"].split(" . ")[0] for rows in made.values() for turns in rows]
    assert len(told) == len(set(told)) == 300
    assert splits(200, 100, seed=0) == made
    assert splits(200, 100, seed=1) != made
    assert splits(200, 50, seed=0)["train"] == made["train"]


def test_every_request_occurs():
    asked = " ".join(turn["content"] for turns in splits(100, 0, 0)["train"] for turn in turns[::2])
    for words in ("say it in the active", "say it in the passive", "is not so", ". who ", "whom did", "did not"):
        assert words in asked
    assert dialogue.REQUESTS == ("turn", "deny", "who", "whom")


@pytest.fixture
def trained(cfg, tmp_path):
    torch.set_num_threads(1)
    overrides = ["task=dialogue", "model=tiny_llama", "trainer=cpu", "logger=[csv]", "method=diffora"]
    sizes = ["task.train_rows=200", "task.validation_rows=40", "search.epochs=1", "finetune.epochs=2"]
    composed = cfg(*overrides, *sizes, "finetune.warmup_steps=2")
    return composed, run(composed, tmp_path / "run")


def test_a_run_lowers_the_perplexity_and_plain_peft_loads_its_adapter(trained):
    composed, result = trained
    assert result.selection.types[:4] == [f"self_attn.{part}_proj" for part in "qkvo"]
    assert [len(row) for row in result.selection.selected] == [3, 3, 3, 3]  # of 7

    task = get_task(composed.task)
    base, tokenizer = (
        load_backbone(model_of(composed.model), task.model_request()).model,
        task.processor(model_of(composed.model)),
    )
    rows = task.load().validation["validation"]
    split = Split(rows, task.encode(rows, tokenizer, training=False))
    outputs = predict(base, task, split, task.collate(tokenizer, False), 16, composed.trainer)
    before = task.score(outputs, split)["perplexity"]
    assert result.metrics["held_out/perplexity"] < 0.6 * before
    assert result.metrics["last/perplexity"] == result.metrics["validation/perplexity"]  # the lower the better

    # Plain transformers and PEFT, as in the adapter's card, give the same logits and answers.
    folder = EMBEDDED.parent / "tiny_llama"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    served = PeftModel.from_pretrained(plain, result.folder / "adapter").eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the king thanked the cook . who thanked the cook ?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        torch.testing.assert_close(served(**prompt).logits, result.model.eval()(**prompt).logits)
        answer = served.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert 0 < len(answer) <= 8
    card = (result.folder / "adapter" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(" in card and "num_labels" not in card
    config = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and not config["modules_to_save"]
