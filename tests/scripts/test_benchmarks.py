"""Benchmarks on tiny shapes: equal contenders, complete results, and the page made from them. Times are not tested."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_benchmarks_gpu import gpu_result

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from benchmarks import arms, common, paths, plots, precision, prefix, report, run, scale, step, time_budget  # noqa: E402

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
BERT = common.Shape("minilm", 4, 8, changes=SMALL | {"num_hidden_layers": 2})
DEBERTA = common.Shape("deberta_v3_base", 4, 8, changes=SMALL | {"num_hidden_layers": 2, "pooler_hidden_size": 32})
LLAMA = common.Shape(
    "llama_1b", 4, 8, changes=SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16}
)


def made(shape, *names):
    backbone = shape.build()
    return [common.CONTENDERS[name](backbone, shape) for name in names]


def gradients(contender, batch):
    """Gradients by the names of the adapted modules and of the head, in PEFT's layout."""
    contender.loss(batch).backward()
    found = {}
    for name, p in contender.model.named_parameters():
        if p.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".default.weight", "").replace("lora_A", "lora_a")
            transposed = name.endswith("lora_bt")
            found[name.replace("lora_bt", "lora_B")] = p.grad.T if transposed else p.grad
    return found


@pytest.mark.parametrize("shape", [BERT, DEBERTA, LLAMA], ids=lambda shape: shape.model)
def test_ours_and_peft_give_the_same_outputs_and_gradients(shape):
    batch = shape.batch()
    ours, peft = made(shape, "lora", "peft")
    assert ours.loss(batch).item() == pytest.approx(peft.loss(batch).item(), rel=1e-4)
    mine, theirs = gradients(ours, batch), gradients(peft, batch)
    assert mine.keys() == theirs.keys() and len(mine) > 20
    # Llama's weights are in bfloat16, where ours and PEFT's each differ from float32 by up to 0.025.
    tolerance = 5e-2 if shape is LLAMA else 1e-4
    for name, gradient in mine.items():
        scale_of = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=tolerance * scale_of + 1e-7, msg=name)


@pytest.mark.parametrize("shape", [BERT, DEBERTA], ids=lambda shape: shape.model)
def test_the_floor_back_propagates_through_every_layer_and_trains_only_the_head(shape):
    floor, full, ours = made(shape, "floor", "full_ft", "lora")
    batch = shape.batch()
    seen = []
    first = shape.names(floor.model)[0]
    floor.model.get_submodule(first).register_full_backward_hook(lambda *given: seen.append(given[1][0]))
    assert floor.loss(batch).item() == pytest.approx(full.loss(batch).item(), rel=1e-5)
    head = {name for name, p in ours.model.named_parameters() if p.requires_grad and "lora" not in name}
    assert head and set(gradients(floor, batch)) == head
    assert seen and seen[0].abs().max() > 0  # the first layer's input has a gradient


def test_a_step_changes_the_trained_weights_and_not_the_shared_backbone():
    backbone = BERT.build()
    shared = {name: p.clone() for name, p in backbone.named_parameters()}
    for name, make in common.CONTENDERS.items():
        if name.startswith("compiled"):
            continue  # takes minutes
        contender = make(backbone, BERT)
        model = contender.module if isinstance(contender, common.Search) else contender.model
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        contender.step(BERT.batch())
        after = dict(model.named_parameters())
        moved = [n for n, before in trained.items() if not torch.equal(before, after[n])]
        assert len(moved) > 0.8 * len(trained), name
        assert all(p.grad is None for p in model.parameters()), name
    for name, p in backbone.named_parameters():
        assert torch.equal(p, shared[name]), name


def test_two_halves_are_two_steps():
    whole, halves = made(BERT, "floor", "two_floors")
    batch = BERT.batch()
    whole.step(batch)
    halves.step(batch)
    assert (whole.number, halves.number) == (1, 2)
    parts = list(common.cut(batch, 2))
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])


def test_memory_counts_what_a_step_adds():
    megabyte = 2**18  # float32
    kept = []

    def add() -> None:
        passing = torch.zeros(3 * megabyte)
        kept.append(torch.zeros(2 * megabyte))
        del passing

    assert common.allocated(add) == pytest.approx(5 * 2**20, rel=0.01)
    bigger = replace(BERT, rows=16, length=16)
    small, large = (common.memory_of(shape, "lora")["step_mb"] for shape in (BERT, bigger))
    assert large > 2 * small


def test_each_round_begins_with_the_next_contender():
    order = []
    names = ("a", "b", "c")
    times = common.interleave({name: lambda name=name: order.append(name) for name in names}, rounds=3, warmup=1)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(names, 3)
    assert report.ratio({"a": [2, 9, 4], "b": [1, 3, 4]}, "a", "b") == {"median": 2, "q1": 1.5, "q3": 2.5, "rounds": 3}


def test_exponents_are_those_of_power_laws():
    x = [1, 2, 4, 8]
    assert scale.exponent(x, [3 * v**1.5 for v in x]) == {"exponent": 1.5, "standard_error": 0.0}
    fit = scale.exponent(x, [1, 2, 4, 16])
    assert fit["exponent"] == pytest.approx(1.3) and fit["standard_error"] > 0.1


def runs_in_two_precisions(seeds):
    """Runs in bfloat16 take 0.4, 0.5, 0.6, … of the time of those in float32."""
    slow = {"metric": "matthews", "wall_s": 100.0, "finetune_s": 90.0, "value": 0.5, "peak_rss_mb": 900.0}
    return {
        "float32": [slow | {"seed": i} for i in range(seeds)],
        "bf16": [
            slow
            | {"wall_s": 40.0 + 10 * i, "finetune_s": 45.0, "value": 0.4 + 0.1 * i, "peak_rss_mb": 500.0 + i, "seed": i}
            for i in range(seeds)
        ],
    }


def test_a_run_in_bfloat16_is_compared_with_that_in_float32_of_the_same_seed():
    runs = runs_in_two_precisions(seeds=3)
    found = precision.summary({"float32": runs["float32"][:2], "bf16": runs["bf16"]})  # the third pair is not complete
    assert found["bf16"]["wall_s"]["to_float32"] == {"median": 0.45, "q1": 0.425, "q3": 0.475, "rounds": 2}
    assert found["bf16"]["metric"] == {"name": "matthews", "mean": 0.45, "values": [0.4, 0.5], "sd": 0.0707}
    assert found["bf16"]["peak_rss_mb"] == 501 and found["float32"]["finetune_s"]["to_float32"]["median"] == 1.0
    assert precision.summary({"float32": runs["float32"], "bf16": []}) == {}


@pytest.fixture(scope="module")
def results():
    """Small results of all benchmarks. The result of the whole run is invented; its processes are tested below."""
    every, shapes = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "in_own_processes", lambda function, jobs: [function(*job) for job in jobs])
        for name in (name for name in step.GROUPS if name.startswith("minilm")):
            small = step.Group(BERT, step.GROUPS[name].contenders, 2)
            shapes[name], found = step.measure(small, 2, memory=name == "minilm_16+16x64_bilevel")
            every |= {f"{key}@{name}": value for key, value in found.items()}
    rounds = dict.fromkeys(shapes, 2)
    of_step = report.header() | {"settings": {"rounds": rounds}, "shapes": shapes, "ratios": step.headlines(every)}
    shapes_of_sweep = {n: replace(BERT, rows=n) for n in (2, 4, 8)}
    of_scale = report.header() | {"sweeps": {"batch": scale.sweep(shapes_of_sweep, 1)}}
    of_scale["search"] = scale.search_against_finetuning(BERT, 2)
    sides = {"diffora": {"training": 2.0, "rest": 1.0}, "hf_trainer": {"evaluation": 1.0, "training": 3.0}}
    runs = {side: [{"accuracy": 0.8, "f1": 0.9, "trainable": 10, "peak_rss_mb": 5.0}] for side in sides}
    of_run = report.header() | {
        "settings": {"data": "d", "backbone": "b", "train_rows": 4, "epochs": 1, "batch": 2, "rank": 4},
        "startup": {"imports_s": {"torch": 1.0}, "help_s": report.spread([1.0]), "first_step_s": report.spread([2.0])},
        "runs": runs,
        "wall_s": {side: report.spread([3.0, 4.0]) for side in sides},
        "parts": sides,
        "ratios": {name: report.spread([0.5, 0.7]) for name in ("run/hf_trainer", "run/hf_trainer_grouped")},
    }
    metrics = {"accuracy": {"plain": {"mean": 0.7, "std": 0.1}, "added": {"mean": 0.8, "std": 0.1}}}
    accuracies = {("plain", 0): 0.6, ("plain", 1): 0.8, ("added", 0): 0.7, ("added", 1): 0.9}
    path_runs = [{"path": p, "seed": n, "metrics": {"accuracy": a}} for (p, n), a in accuracies.items()]
    of_paths = report.header() | {"summary": metrics, "runs": path_runs}
    of_precision = report.header() | {
        "settings": {"task": "cola", "backbone": "mpnet_base", "epochs": 1, "unit": "AMX"},
        "arms": precision.summary(runs_in_two_precisions(seeds=3)),
    }
    of_contention = report.header() | {
        "overrides": ["experiment=quickstart"],
        "busy": 2,
        "seconds": {side: report.spread([3.0]) for side in ("alone", "passive", "spinning")},
        "ratios": {f"{side}/alone": report.spread([1.5]) for side in ("passive", "spinning")},
    }
    every_source = {"step": of_step, "run": of_run, "scale": of_scale, "paths": of_paths, "gpu": gpu_result()}
    every_source |= {"precision": of_precision, "contention": of_contention}
    return json.loads(json.dumps(every_source))


def test_results_have_every_headline(results):
    found = results["step"]["ratios"]
    of_memory = {name for name in step.MEMORY_PAIRS if name.startswith("search_memory")}
    assert {name for name in plots.TARGETS if not name.startswith("run/")} <= set(found)
    for name, value in found.items():
        assert value.keys() == {"median", "q1", "q3", "rounds"}, name
        assert value["rounds"] == (1 if name.split("@")[0] in of_memory else 2), name
    assert found["finetune/peft"] == found["finetune/peft@minilm_16x64"]
    assert results["step"]["machine"].keys() >= {"cpu", "cores", "threads", "ram_gb"}
    assert results["step"]["versions"].keys() == {"python", "torch", "transformers", "peft", "diffora"}


def test_search_costs_follow_from_the_recipes(results):
    tasks = results["scale"]["search"]["tasks"]
    assert tasks["mrpc"]["search_steps/finetune_steps"] == pytest.approx(5 * 0.5 / 14, abs=1e-4)
    median = results["scale"]["search"]["step/finetune_step"]["alternating"]["median"]
    assert tasks["mrpc"]["alternating"] == pytest.approx(5 * 0.5 / 14 * median, abs=2e-3)


def test_the_page_shows_all_results_and_says_what_is_missing(results, tmp_path):
    page = plots.PAGE.read_text()
    full = plots.refresh(page, results)
    assert "Not measured yet" not in full and "not measured" not in full[full.index("<!-- begin ratios") :][:4000]
    assert all(f"images/{name}.png" in full for name in plots.PICTURES)
    assert plots.refresh(full, results) == full
    empty = plots.refresh(full, dict.fromkeys(plots.SOURCES))
    assert empty.count("Not measured yet") == len(plots.TABLES) and "images/" not in empty
    for name, (source, draw, _) in plots.PICTURES.items():
        draw(results[source]).savefig(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="ratios"):
        plots.refresh(page.replace("<!-- begin ratios -->", ""), results)


def test_the_page_is_up_to_date_with_the_results():
    present = {name: report.read(name) for name in plots.SOURCES}
    assert plots.refresh(plots.PAGE.read_text(), present) == plots.PAGE.read_text()


def test_both_sides_of_a_whole_run_get_the_same_settings(tmp_path):
    setting = run.Setting.find(None, None, tmp_path, epochs=2)
    ours = dict(override.split("=", 1) for override in setting.ours(tmp_path / "run", seed=3))
    peer = setting.peer(seed=3)
    value = {name: peer[peer.index(name) + 1] for name in peer if name.startswith("--")}
    assert (ours["seed"], ours["rank"], ours["finetune.epochs"]) == (
        value["--seed"],
        value["--rank"],
        value["--epochs"],
    )
    assert ours["task.path"] == value["--data"] and ours["model.path"] == value["--model"]
    assert float(ours["finetune.lr"]) == float(value["--lr"]) and float(ours["finetune.dropout"]) == 0
    assert ours["finetune.batch_size"] == value["--batch-size"]
    assert (ours["method.alpha"], ours["task.max_length"]) == (value["--alpha"], value["--max-length"])
    assert ours["finetune.warmup_steps"] == value["--warmup-steps"] == str(4000 // 32 * 2 // 10)
    assert setting.described()["data"].startswith("the embedded task")


@pytest.mark.slow
def test_memory_in_new_processes():
    jobs = [(BERT, "floor"), (BERT, "lora")]
    floor, lora = common.in_own_processes(common.memory_of, jobs)
    assert 0 < floor["step_mb"] < lora["step_mb"]


@pytest.mark.slow
def test_a_whole_run_of_both_sides(tmp_path):
    """On 200 rows of the embedded task, with all the processes that the benchmark starts."""
    import pyarrow.parquet

    setting = run.Setting.find(None, None, tmp_path, epochs=1)
    for name in ("train", "validation"):
        table = pyarrow.parquet.read_table(tmp_path / f"{name}.parquet")
        pyarrow.parquet.write_table(table.slice(0, 200), tmp_path / f"{name}.parquet")
    setting = run.Setting(tmp_path, setting.model, setting.folder, setting.max_length, setting.epochs)  # of 200 rows
    result = run.measure(setting, list(run.SIDES), repetitions=1)
    assert result["ratios"].keys() == {"run/hf_trainer", "run/hf_trainer_grouped"}
    trained = {found[0]["trainable"] for found in result["runs"].values()}
    assert len(trained) == 1
    for side in ("diffora", "hf_trainer"):
        assert sum(result["parts"][side].values()) > 0 and min(result["parts"][side].values()) > -0.05
    assert 0 < result["startup"]["first_step_s"]["median"] < result["wall_s"]["diffora"]["median"]
    assert "torch" in result["startup"]["imports_s"]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [(step, ["--only", "minilm_16x64", "--no-memory"]), (scale, ["--only", "batch"])],
    ids=["step", "scale"],
)
def test_commands_write_only_to_the_given_file(module, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step.GROUPS, "minilm_16x64", step.Group(BERT, ("floor", "lora"), 9))
    monkeypatch.setitem(scale.SWEEPS, "batch", {n: replace(BERT, rows=n) for n in (2, 4, 8)})
    for module_ in (step, scale):
        monkeypatch.setattr(module_, "RESULTS", tmp_path)
    file = tmp_path / "elsewhere.json"
    for more in ([], ["--output", str(file)]):
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--rounds", "1", *more])
        module.main()
        assert list(tmp_path.iterdir()) == ([file] if more else [])
    assert "lora" in capsys.readouterr().out
    assert json.loads(file.read_text())["machine"]["threads"] > 0


def test_selections_within_a_time_budget_have_the_parameters_of_lora_everywhere():
    result = time_budget.measure(replace(BERT, rank=2), rounds=2, budgets=(0.1, 0.8))
    [(budget, found)] = result["budgets"].items()  # 0.1 is impossible and left out
    assert budget == "0.8" and found["lowest_layer"] == 1 and found["counted"] <= 0.8
    everywhere = 2 * 2 * (4 * 64 + 2 * 96)
    assert 0.9 * everywhere < found["parameters"] <= everywhere and found["measured"]["rounds"] == 2


def test_arms_with_a_cached_prefix_have_as_many_parameters(cfg, tmp_path):
    from diffora.run.experiment import run as run_experiment

    n_layers = 6
    found = prefix.arms(n_layers)
    assert list(found) == ["all", "half", "half cached", "third", "third cached"]
    base = ["method=lora", "model=minilm", "task=mrpc", "dry_run=true", "trainer=cpu", "logger=none"]
    counts = {
        name: run_experiment(cfg(*base, *overrides), tmp_path / "run").record["params"]["adapter"]
        for name, overrides in found.items()
    }
    assert len(set(counts.values())) == 1, counts


def test_ratios_of_whole_runs_are_paired_by_seed(capsys):
    calls, kept = [], []

    def one(overrides):
        calls.append(overrides)
        seed = int(overrides[-1].removeprefix("seed="))
        cached, upper = "trainer.cache_prefix=true" in overrides, any("model.layer" in o for o in overrides)
        seconds = (10.0 + seed) * (0.5 if cached else 0.8 if upper else 1)
        facts = {"wall_s": seconds, "finetune_s": seconds / 2, "step_s": 1.0, "parameters": 8, "peak_rss_mb": 1}
        return facts | {"prefix": None, "accuracy": 0.8 + 0.01 * cached, "f1": 0.9}

    runs = arms.measure(["task=mrpc"], prefix.arms(6), [0, 5], one, lambda runs: kept.append(prefix.summary(runs)))
    assert len(calls) == len(kept) == 10 and kept[0] == {} and calls[0][-1] == "seed=0"
    assert not any("model.layer" in o for o in calls[0]) and any("model.layer" in o for o in calls[5])  # turns
    found = prefix.summary(runs)
    assert found["half cached"]["wall_s"]["to_all"] == {"median": 0.5, "q1": 0.5, "q3": 0.5, "rounds": 2}
    assert found["third"]["finetune_s"]["to_all"]["median"] == 0.8
    assert found["third cached"]["accuracy"]["minus_uncached"] == [0.01, 0.01]
    assert "minus_uncached" not in found["half"]["accuracy"]
    chosen = prefix.summary({name: runs[name] for name in ("all", "half cached")})  # --arms "half cached"
    assert chosen["half cached"]["accuracy"] == {"mean": 0.81, "values": [0.81, 0.81], "sd": 0.0}
    prefix.show(found)
    assert "third cached" in capsys.readouterr().out


def test_further_seeds_are_added_to_runs_of_the_same_settings_and_processor():
    def result(seed, seconds, **settings):
        run = {"parameters": 8, "prefix": None, "accuracy": 0.8, "f1": 0.9, "seed": seed}
        runs = {name: [run | {"wall_s": s, "finetune_s": s}] for name, s in (("all", 10.0), ("half cached", seconds))}
        machine = {"cpu": "one", "load_before": 0.1 * seed}
        return {
            "settings": {"epochs": 2} | settings,
            "machine": machine,
            "commit": f"c{seed}",
            "date": "d",
            "runs": runs,
        }

    earlier, later = result(0, 5.0), result(2, 7.0)
    prefix.check_addable(earlier, later, [2])
    both = prefix.added(earlier, later)
    assert both["arms"]["half cached"]["wall_s"]["to_all"]["median"] == 0.6
    assert [run["seed"] for run in both["runs"]["all"]] == [0, 2] and both["commit"] == "c0"
    interrupted = {
        **earlier,
        "runs": earlier["runs"] | {"all": [*earlier["runs"]["all"], result(1, 0)["runs"]["all"][0]]},
    }
    again = prefix.added(interrupted, later)["arms"]["half cached"]["wall_s"]["to_all"]
    assert again == both["arms"]["half cached"]["wall_s"]["to_all"]  # seed 1 has no partner
    assert both["added"] == [{"seeds": [2], "commit": "c2", "date": "d", "load_before": 0.2}]
    for other, seeds in ((later, [1, 0]), (result(2, 7.0, epochs=3), [2]), (later | {"machine": {"cpu": "two"}}, [2])):
        with pytest.raises(SystemExit, match="--add needs other seeds"):
            prefix.check_addable(earlier, other, seeds)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (prefix, ["--add", "--output", "none.json"], "--add: there are no runs in none.json"),
        (paths, ["--output", "other.json", "--", "task=mrpc"], "other.json has runs with task=sst2 on"),
    ],
    ids=["prefix", "paths"],
)
def test_runs_of_other_settings_are_not_replaced(module, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = json.dumps({"settings": ["task=sst2"], "machine": report.machine(), "runs": []})
    (tmp_path / "other.json").write_text(kept)
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit):
        module.main()
    assert message in capsys.readouterr().err and (tmp_path / "other.json").read_text() == kept


def test_whole_runs_of_other_data_do_not_replace_the_kept_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "measure", lambda setting, sides, repetitions: {"ratios": {}})
    monkeypatch.setattr(sys, "argv", ["run"])
    run.main()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["run", "--output", str(tmp_path / "own.json")])
    run.main()
    assert [file.name for file in tmp_path.iterdir()] == ["own.json"]


def test_the_page_can_be_made_from_interrupted_benchmarks(results):
    one = {
        key: {path: {"mean": 0.7, "std": None} for path in value} for key, value in results["paths"]["summary"].items()
    }
    few = {
        "paths": results["paths"] | {"summary": one, "runs": [r for r in results["paths"]["runs"] if r["seed"] == 0]},
        "precision": results["precision"] | {"arms": {}},
        "contention": results["contention"] | {"seconds": {"passive": report.spread([3.0])}, "ratios": {}},
        "gpu": results["gpu"] | {"checks": [check for check in results["gpu"]["checks"] if check["error"] is None]},
    }
    page = plots.refresh(plots.PAGE.read_text(), results | few)
    assert page.count("Not measured yet") == 1 and "No comparison of losses and gradients was possible" in page
