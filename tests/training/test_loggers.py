"""What W&B is given besides what the stages log."""

import wandb
import yaml
from conftest import REPO

from diffora.experiment import check
from diffora.training.loggers import Loggers


def test_selection_and_adapter_are_kept_as_artefacts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "selection.json").write_text("{}")
    kept = {}
    monkeypatch.setattr(wandb.Run, "log_artifact", lambda self, artifact: kept.update({artifact.type: artifact}))
    choice = {"project": "test", "entity": None, "group": "g", "tags": []}
    loggers = Loggers({"wandb": choice}, run, {})
    about = {"method": "diffora", "task": "mrpc", "model": "tiny", "seed": 3}
    loggers.summary({**about, "metrics": {"validation/accuracy": 0.9}, "params": {}, "time": {}, "memory": {}})
    name = loggers.wandb.experiment.id
    loggers.finish(failed=False)
    files = {
        kind: (artifact.name.partition(":")[0], list(artifact.manifest.entries)) for kind, artifact in kept.items()
    }
    assert files == {
        "selection": (f"selection-{name}", ["selection.json"]),
        "adapter": (f"adapter-{name}", ["adapter_config.json"]),
    }
    assert kept["adapter"].metadata == about


def test_the_sweep_files_call_the_command_with_keys_that_there_are(cfg):
    files = sorted((REPO / "docs" / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        sweep = yaml.safe_load(file.read_text())
        assert (REPO / sweep["program"]).is_file() and sweep["command"][-1] == "${args_no_hyphens}"
        overrides = []
        for key, choice in sweep["parameters"].items():
            value = (
                choice["value"] if "value" in choice else choice["values"][0] if "values" in choice else choice["min"]
            )
            overrides.append(f"{key}={value}")
        composed = cfg(*overrides)
        check(composed)
        part, _, metric = sweep["metric"]["name"].partition("/")
        assert part in ("validation", "held_out") and metric
