"""``diffora push`` and adapters on the hub, against a hub on this machine."""

import getpass
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import TOKEN, fake_hub
from transformers import AutoModelForSequenceClassification

import diffora
from diffora.adapters.fetch import local_copy
from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.run import evaluate, push


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub(monkeypatch, tmp_path / "hub-cache") as made:
        yield made


def pushed(*arguments) -> str:
    return push.push(push.read_request([str(argument) for argument in arguments]))


def base() -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(EMBEDDED, num_labels=2)


def test_a_run_is_published_in_one_commit_and_loads_again(hub, finished):
    assert pushed(finished, "somebody/mine", "private=true", "base=org/base") == f"{hub.url}/somebody/mine"
    files = hub.repos["somebody/mine"]
    assert hub.commits == {"somebody/mine": 1} and hub.private["somebody/mine"]
    wanted = {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "selection.json"}
    assert wanted <= files.keys() and {"dam.png", "gamma.png"} <= files.keys()
    assert files["adapter_model.safetensors"] == (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    assert files["dam.png"] == (finished / "dam.png").read_bytes()

    folder = local_copy("somebody/mine")
    assert all((folder / name).read_bytes() == files[name] for name in wanted - {"README.md"})
    assert not (folder / "dam.png").exists()  # only what is read is downloaded
    here, present = base(), base()
    diffora.load_adapter(here, finished / "adapter")
    diffora.load_adapter(present, "somebody/mine")
    assert all(torch.equal(value, present.state_dict()[key]) for key, value in here.state_dict().items())
    assert [name for name, p in here.named_parameters() if p.requires_grad] == [
        name for name, p in present.named_parameters() if p.requires_grad
    ]


def test_the_card_has_results_selection_and_code_and_no_local_facts(hub, finished):
    pushed(finished, "somebody/mine")
    files = hub.repos["somebody/mine"]
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "peft", "tags": ["diffora", "paraphrase", "lora"]}  # no hub id of the base model
    record = json.loads((finished / "run.json").read_text())
    assert f"| validation/f1 | {record['metrics']['validation/f1']:.4f} |" in card
    assert f"| layer 1 | {', '.join(record['selection']['selected'][0])} |" in card
    assert "![dam](dam.png)" in card and 'PeftModel.from_pretrained(base, "somebody/mine")' in card
    text = "".join(content.decode() for name, content in files.items() if name.endswith((".md", ".json")))
    for secret in (str(Path.home()), str(finished), str(EMBEDDED), TOKEN, socket.gethostname(), "/tmp"):
        assert secret not in text
    assert getpass.getuser() not in re.findall(r"\w+", text)


def test_the_code_of_the_card_runs(hub, finished, monkeypatch):
    pushed(finished, "somebody/mine", "base=org/base")
    card = hub.repos["somebody/mine"]["README.md"].decode()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    first, second = (code[i].replace("org/base", str(EMBEDDED)) for i in (0, 1))
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda base, place: base)  # PEFT would ask the real hub
    space: dict = {}
    exec(first, space)
    exec(second, space)
    assert space["base"].config.id2label == {0: "not_equivalent", 1: "equivalent"}


def test_a_second_push_replaces_the_files_in_a_second_commit(hub, finished):
    pushed(finished, "somebody/mine")
    first = dict(hub.repos["somebody/mine"])
    pushed(finished, "somebody/mine", "form=compact")
    assert hub.commits == {"somebody/mine": 2}
    assert hub.repos["somebody/mine"]["adapter_config.json"] != first["adapter_config.json"]
    again = base()
    diffora.load_adapter(again, "somebody/mine")


def test_a_whole_model_is_published_with_its_tokenizer(hub, finished):
    pushed(finished, "somebody/whole", "form=merged", "base=org/base")
    files = hub.repos["somebody/whole"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["library_name"] == "transformers" and front["base_model_relation"] == "finetune"


def test_a_push_leaves_no_file_of_an_earlier_run(hub, finished):
    mine = "somebody/mine"
    pushed(finished, mine)
    hub.repos[mine] |= {"exact.safetensors": b"of another run", "notes.txt": b"by hand"}
    pushed(finished, mine)
    assert "exact.safetensors" not in hub.repos[mine] and hub.repos[mine]["notes.txt"] == b"by hand"
    diffora.load_adapter(base(), mine)


def test_a_model_and_an_adapter_are_not_mixed(hub, finished):
    pushed(finished, "somebody/mine")
    before = dict(hub.repos["somebody/mine"])
    with pytest.raises(UserError, match=r"it has adapter_config\.json, and this is a whole model: choose another name"):
        pushed(finished, "somebody/mine", "form=merged")
    assert hub.repos["somebody/mine"] == before
    pushed(finished, "somebody/whole", "form=merged")
    with pytest.raises(UserError, match=r"it has model\.safetensors, and this is an adapter"):
        pushed(finished, "somebody/whole")


def test_a_private_push_does_not_go_to_a_public_repository(hub, finished):
    pushed(finished, "somebody/mine")
    with pytest.raises(UserError, match="exists already and is public"):
        pushed(finished, "somebody/mine", "private=true")
    assert hub.commits == {"somebody/mine": 1}


@pytest.mark.parametrize("text", ["line\n/home/me/data/x", "a\t/home/me/data", "-C /home/me/data/train.csv"])
def test_a_path_is_found_in_any_text(text, tmp_path, hub, finished, monkeypatch):
    request = push.read_request([str(finished), "me/it"])
    request.export.cfg.task.path = "/home/me/data/"
    (tmp_path / "a.json").write_text(json.dumps({"a": text}))
    with pytest.raises(UserError, match="would publish the path /home/me/data"):
        push._check_no_paths(tmp_path, request)


def test_shards_replace_a_model_in_one_file(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    present = ["model.safetensors", "model.safetensors.index.json", "config.json", "dam.png"]
    assert push._stale(present, tmp_path) == ["model.safetensors", "dam.png"]


def test_a_name_that_contains_the_current_folder_is_no_path(hub, finished, monkeypatch):
    monkeypatch.chdir("/opt")
    pushed(finished, "me/opt-it")
    assert "me/opt-it" in hub.repos


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [
        ("whoami", 401, "does not know your token: log in with `hf auth login`"),
        ("whoami", 500, r"answers with an error \(HTTP 500\): try again later"),
        ("repos/create", 403, "your token may not do this with somebody/mine"),
        ("preupload", 404, "has no somebody/mine"),
        ("commit", 403, "needs write access"),
        ("commit", 409, "changed by somebody else at the same moment"),
        ("commit", 500, "try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_message_and_nothing_is_published(word, status, said, hub, finished, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between attempts
    hub.fail[word] = status
    with pytest.raises(UserError, match=said):
        pushed(finished, "somebody/mine")
    assert not hub.commits and not hub.repos.get("somebody/mine")
    hub.fail.clear()
    pushed(finished, "somebody/mine")  # the same command again
    assert hub.commits == {"somebody/mine": 1}


def test_without_a_token_nothing_is_asked(monkeypatch, tmp_path, finished):
    with fake_hub(monkeypatch, tmp_path, token=None) as hub:
        with pytest.raises(UserError, match="you are not logged in to the hub: `hf auth login`, or set HF_TOKEN"):
            pushed(finished, "somebody/mine")
        assert not hub.asked


def test_a_hub_that_does_not_answer(monkeypatch, tmp_path, finished):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with fake_hub(monkeypatch, tmp_path) as hub:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached"):
            pushed(finished, "somebody/mine")
        with pytest.raises(UserError, match=r"does not answer .*, and it is not in the local cache"):
            local_copy("somebody/mine")
        assert not hub.asked


def test_mistakes_are_found_before_the_hub_is_asked(hub, finished, tmp_path):
    with pytest.raises(UserError) as caught:
        push.read_request(["no/such/run", "three/part/name", "private=maybe", "form=gguf", "base=x", "lr=1"])
    said = "\n".join(caught.value.problems)
    for text in ("is no name on the hub", "private=", "form='gguf' must be one of", "base=", "unknown key lr"):
        assert text in said
    shutil.copytree(finished, tmp_path / "running")
    record = json.loads((tmp_path / "running" / "run.json").read_text())
    del record["sha256"]
    (tmp_path / "running" / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with pytest.raises(UserError, match="is not a finished run: its status is running"):
        push.read_request([str(tmp_path / "running"), "somebody/mine"])
    assert not hub.asked


def test_names_that_lead_to_no_adapter(hub, finished, tmp_path, monkeypatch):
    hub.repos["somebody/model"] = {"config.json": b"{}"}
    hub.repos["somebody/pickle"] = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.bin": b"pickle"}
    for place, revision, said in (
        ("somebody/nothing", None, "has no somebody/nothing, or it is private"),
        ("somebody/model", None, "somebody/model on the hub is not an adapter"),
        ("somebody/pickle", None, "has no adapter_model.safetensors"),
        ("somebody/model", "v2", "has no such revision"),
        ("some/where/else", None, "is not a folder, and no hub id"),
        (finished / "adapter", "v2", "revision=v2 is for adapters on the hub"),
        (finished, None, "is one"),
    ):
        with pytest.raises(UserError, match=said):
            diffora.load_adapter(base(), place, revision=revision)


def test_a_folder_has_priority_and_a_download_is_kept(hub, finished, tmp_path, monkeypatch):
    pushed(finished, "somebody/mine")
    folder = local_copy("somebody/mine")
    assert local_copy("somebody/mine", revision=hub.sha("somebody/mine")) == folder
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "adapter", tmp_path / "somebody" / "mine")
    assert local_copy("somebody/mine") == Path("somebody/mine")
    shutil.rmtree(tmp_path / "somebody")
    from huggingface_hub import constants

    from diffora.hub import why_unreachable

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    why_unreachable.cache_clear()
    assert local_copy("somebody/mine") == folder


def test_evaluate_and_a_fine_tuning_take_a_hub_id(hub, finished, tmp_path):
    from finished_run import run_of

    pushed(finished, "somebody/mine")
    request = evaluate.read_request(
        ["adapter=somebody/mine", "model=tiny", "task=paraphrase", f"output={tmp_path / 'out'}"]
    )
    assert request.weights == local_copy("somebody/mine")
    result = run_of(tmp_path / "run", "method=lora", "method.adapter=somebody/mine", "finetune.lr=1e-12")
    old = json.loads((finished / "run.json").read_text())
    assert result.metrics["validation/loss"] == pytest.approx(old["metrics"]["validation/loss"], abs=1e-5)
