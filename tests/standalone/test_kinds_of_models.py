"""Which models the library takes (wrapped, half precision, quantised, placed, checkpointed); how it leaves them."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from library import CASES, Net, assert_same, bert, entropy_loss, pairs, state, texts
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModel,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import diffora
from diffora.backbones.backbone import pretrained_children
from diffora.core import attach as core_attach
from diffora.core.lowrank import LowRankLinear, lowrank_layers, set_gates
from diffora.core.norms import keep_statistics, moving_statistics
from diffora.errors import UserError
from diffora.loop.stage import Stage
from diffora.standalone.bilevel import Bilevel
from diffora.standalone.settings import SearchSettings

SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
BERT = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def search(model, batches, loss=None, **more):
    return diffora.search(
        model, batches[:3], batches[3:], loss=loss, **{"rounds": 1, "gamma_lr": 0.1, "progress": False} | more
    )


def made(name):
    make, batches, loss = CASES[name]
    torch.manual_seed(0)
    return make(), batches(), loss


class Normed(nn.Module):
    """A net with batch norms; ``config`` is an attribute of its own, as many nets have one."""

    def __init__(self):
        super().__init__()
        self.config = {"width": 8}
        self.layers = nn.ModuleList(
            nn.ModuleDict({"a": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8), "b": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer["b"](layer["norm"](layer["a"](x)).relu())
        return self.head(x)


def test_a_search_leaves_the_statistics_of_batch_norms_and_trains_the_head():
    torch.manual_seed(0)
    model = Normed()
    model.layers.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(6, 8) + 3, torch.arange(6) % 2) for _ in range(5)]
    found = search(model, batches, entropy_loss)
    assert found.config["trained"] == ["head.weight", "head.bias"]
    after = model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items() if not name.startswith("head"))


def test_statistics_of_frozen_batch_norms_stay_and_others_move():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).train()
    net[0].requires_grad_(False)
    keep_statistics(net)
    net(torch.randn(16, 4) + 3)
    assert net[0].running_mean.equal(torch.zeros(4)) and not net[1].running_mean.equal(torch.zeros(4))
    assert net[1].training


def test_the_statistics_of_trained_batch_norms_belong_to_what_is_saved():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(True)
    stage = Stage(net, seed=0)
    stage.setup("fit")
    before = stage.trainable_state()
    statistics = {f"model.2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert before.keys() - {name for name, _ in stage.named_parameters()} == statistics
    net.train()(torch.randn(5, 4) + 3)
    assert any(not value.equal(before[name]) for name, value in stage.trainable_state().items())
    stage.load_trainable(before)
    assert all(value.equal(before[name]) for name, value in stage.trainable_state().items())


def test_batch_norms_without_weights_keep_their_statistics():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)).train()
    keep_statistics(net)
    net(torch.randn(5, 4) + 3)
    assert not net[1].running_mean.any() and not moving_statistics(net)


def test_torchs_own_encoder_runs_in_evaluation_with_adapters_in_its_upper_layers():
    """Its nested tensors are for layers without adapters; the first layer decides whether they are used."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=padding)
        core_attach.attach(encoder, [["layers.1.linear1"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
        after = encoder(x, src_key_padding_mask=padding)
    assert torch.allclose(before[~padding], after[~padding], atol=1e-5)  # B is 0


def test_torchs_own_encoder_may_use_nested_tensors_again_after_a_search():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 2)})

    def loss(model, batch):
        return nn.functional.cross_entropy(model["head"](model["encoder"](batch[0]).mean(1)), batch[1])

    search(model, pairs(5, 8), loss, layer="encoder.layers.*", candidates=["linear1", "linear2"])
    assert encoder.use_nested_tensor
    core_attach.attach(model, [["encoder.layers.1.linear1"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
    assert not encoder.use_nested_tensor
    core_attach.detach(model)
    assert encoder.use_nested_tensor


def test_a_buffer_with_one_value_for_several_elements_is_left_as_it_was():
    torch.manual_seed(0)
    model = Net()
    model.register_buffer("scale", torch.ones(1).expand(8))
    before = state(model)
    search(model, pairs(8), entropy_loss)
    assert_same(before, state(model))


@pytest.mark.parametrize(("layer", "trained"), [("blocks.[2]", ["norm", "head"]), (".", [])])
def test_layers_beside_those_of_the_grid_are_not_the_head(layer, trained):
    torch.manual_seed(0)
    candidates = ["blocks.2.0", "blocks.2.3"] if layer == "." else None
    found = search(Net(), pairs(8), entropy_loss, layer=layer, candidates=candidates)
    assert found.config["trained"] == [f"{name}.{kind}" for name in trained for kind in ("weight", "bias")]


@pytest.mark.parametrize("layer", ["stages.*.mixer", "stages.[1].mixer"])
def test_layers_may_have_their_number_in_the_middle_of_the_name(layer):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(
                nn.ModuleDict({"mixer": nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})}) for _ in range(2)
            )
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            for stage in self.stages:
                x = x + stage["mixer"]["b"](stage["mixer"]["a"](x).relu())
            return self.head(x)

    found = search(Mixed(), pairs(8), entropy_loss, layer=layer, candidates=["a", "b"], k=1)
    assert found.config["trained"] == ["head.weight", "head.bias"]


def test_gradients_in_float16_do_not_underflow():
    """The mean over very many terms has gradients below the smallest number of float16."""
    torch.manual_seed(0)
    model, batches = Net().eval(), pairs(8)

    def small(model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x.to(model.head.weight.dtype)).float(), y) / 4096

    half = copy.deepcopy(model).half()
    exact = diffora.select(model, "gradient", batches, loss=small, k=1, progress=False)
    found = diffora.select(half, "gradient", batches, loss=small, k=1, progress=False)
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(exact.scores), rtol=0.02, atol=0)
    gates = [search(each, batches, small, k=1).gamma_bar for each in (model, half)]
    torch.testing.assert_close(torch.tensor(gates[1]), torch.tensor(gates[0]), rtol=0.02, atol=0)


def test_after_an_overflow_the_scale_is_reduced():
    torch.manual_seed(0)
    model = Net().half()
    layers = core_attach.attach(model, [["blocks.0.0"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
    settings = SearchSettings(rounds=1, rank=2, alpha=4, lr=1e-3, gamma_lr=0.1, weight_decay=0, clip=None,
                              train_steps=1, relaxation="sigmoid")  # fmt: skip
    layers[0][0].lora_bt.data.fill_(0.5)

    def large(model, batch):
        return model(batch[0].half()).sum() * 500.0

    bilevel = Bilevel(model, layers, [], large, settings)
    _, gradient = bilevel.gamma_gradient(pairs(8)[0])
    assert gradient.isfinite().all() and bilevel.scale < 1024


# --- wrappers ---


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_the_module_inside_a_wrapper_is_searched_and_adapted(wrap):
    model, batches, loss = made("net")
    wanted = search(model, batches, loss)
    wrapped = wrap(model)
    assert search(wrapped, batches, loss) == wanted
    assert diffora.select(wrapped, "gradient", batches, loss=loss).modules == wanted.modules
    assert diffora.attach(wrapped, wanted, rank=2) is wrapped
    assert {name for name, _ in lowrank_layers(model)} == set(wanted.names())


def test_a_model_compiled_in_place_is_searched_as_it_is_and_stays_compiled():
    model, batches, loss = made("net")
    wanted = search(model, batches, loss)
    model.compile(backend="eager")
    model.blocks[1].compile(backend="eager")
    compiled = [module._compiled_call_impl for module in model.modules()]
    seen = []

    def noted(model, batch):
        seen.append(any(module._compiled_call_impl for module in model.modules()))
        return loss(model, batch)

    assert search(model, batches, noted) == wanted and not any(seen)
    assert [module._compiled_call_impl for module in model.modules()] == compiled and sum(map(bool, compiled)) == 2


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_of_several_processes_is_refused(group):
    model, batches, loss = made("net")
    wrapped = nn.parallel.DistributedDataParallel(model)
    selection = search(model, batches, loss)
    for call in (
        lambda: search(wrapped, batches, loss),
        lambda: diffora.select(wrapped, "random"),
        lambda: diffora.attach(wrapped, selection, rank=2),
    ):
        with pytest.raises(
            UserError, match=r"is a DistributedDataParallel, which several processes train.*model\.module"
        ):
            call()


def test_an_adapter_that_is_divided_among_processes_is_not_saved(group, tmp_path):
    model, batches, loss = made("net")
    diffora.attach(model, search(model, batches, loss), rank=2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UserError, match=r"is divided among processes \(FSDP\): gather the weights"):
        diffora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_several_processes_are_warned_that_each_searches_alone(monkeypatch, caplog):
    model, batches, loss = made("net")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    search(model, batches, loss)
    assert "2 processes are running, and each one searches by itself" in caplog.text


# --- precision ---


@pytest.mark.parametrize("name", CASES)
def test_a_model_in_bfloat16_is_searched_and_left_as_it_was(name):
    model, batches, loss = made(name)
    model = model.bfloat16()
    if loss is not None:
        batches = [(x.bfloat16(), y) for x, y in batches]
    before = state(model)
    found = search(model, batches, loss)
    assert_same(before, state(model))
    assert found.config["trained"] and torch.tensor(found.gamma_bar).std() > 0


def test_small_steps_of_a_head_in_bfloat16_are_not_rounded_away():
    settings = {"rounds": 1, "rank": 2, "alpha": 4.0, "lr": 1e-4, "gamma_lr": 0.01, "weight_decay": 0.0}
    settings |= {"clip": None, "train_steps": 1, "relaxation": "softmax"}
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Net().eval().to(dtype)
        nn.init.ones_(model.head.weight)  # next to 1, numbers in bfloat16 are at least 0.004 apart
        grid = diffora.find_grid(model)
        layers = core_attach.attach(model, grid.names, torch.ones(3, 2, dtype=torch.bool), 2, None, 4.0)
        model.head.requires_grad_(True)
        bilevel = Bilevel(model, layers, list(model.head.parameters()), entropy_loss, SearchSettings(**settings))
        for x, y in pairs(8, n=40):
            bilevel.weight_step((x.to(dtype), y))
        moved[dtype] = (bilevel.masters[-2] - 1).float()
        assert model.head.weight.equal(bilevel.masters[-2].to(dtype))
    assert moved[torch.float32].abs().max() < 0.004 and moved[torch.float32].abs().min() > 0
    assert torch.allclose(moved[torch.bfloat16], moved[torch.float32], atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_searched_and_left_as_it_was(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = bert()
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    for name in [name for name, part in model.bert.encoder.named_modules() if isinstance(part, nn.Linear)]:
        old = model.bert.encoder.get_submodule(name)
        new = kind(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        model.bert.encoder.set_submodule(name, new)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    flags = [p.requires_grad for p in model.parameters()]
    found = search(model, texts())
    assert torch.tensor(found.gamma_bar).std() > 0
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    with pytest.raises(UserError, match="is quantised and cannot be read"):
        diffora.select(model, "gradient", texts())


# --- devices ---


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = Net()
    for call in (lambda: search(model, pairs(8), entropy_loss), lambda: diffora.select(model, "random")):
        with pytest.raises(UserError, match=r"norm\.weight \(and \d+ more\) has no values on its device: load"):
            call()


def test_a_model_that_accelerate_placed_is_searched_and_keeps_its_hooks():
    model, batches, loss = made("bert")
    wanted = search(model, batches, loss)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    forwards = {name: part.forward for name, part in model.named_modules() if hasattr(part, "_hf_hook")}
    assert forwards
    found = search(model, batches, loss)
    assert found.selected == wanted.selected
    assert torch.allclose(torch.tensor(found.gamma_bar), torch.tensor(wanted.gamma_bar), atol=1e-5)
    assert {n: part.forward for n, part in model.named_modules() if hasattr(part, "_hf_hook")} == forwards


def test_a_model_that_accelerate_offloaded_is_refused():
    model, batches, loss = made("bert")
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UserError, match=r"let no device_map move them"):
        search(model, batches, loss)


def test_a_gate_is_on_the_device_of_its_layer():
    layers = []
    for device in ("cpu", "meta"):
        base = nn.Linear(4, 4, device=device)
        layers.append([LowRankLinear(base, *core_attach.new_pair(base, 2), alpha=2)])
    gates = torch.ones(2, 1, requires_grad=True)
    set_gates(layers, gates)
    assert [row[0].gate.device.type for row in layers] == ["cpu", "meta"]
    assert all(row[0].gate.requires_grad for row in layers)


# --- checkpointed activations ---


def test_checkpointed_activations_change_nothing():
    found = []
    for checkpointed in (False, True):
        model, batches, _ = made("bert")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(torch.tensor(search(model, batches, rounds=2).gamma_bar))
        assert model.is_gradient_checkpointing is checkpointed
    assert torch.allclose(found[0], found[1], atol=1e-5) and found[0].std() > 1e-3


def test_reentrant_checkpoints_are_refused_with_what_to_call():
    model, batches, _ = made("bert")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    before = state(model)
    with pytest.raises(UserError, match=r'gradient_checkpointing_enable\(\{"use_reentrant": False\}\)'):
        search(model, batches)
    assert_same(before, state(model))


# --- architectures of transformers ---

SIZES = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def t5():
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def language(n=6):
    return [{**batch, "labels": batch["input_ids"]} for batch in texts(n)]


@pytest.mark.parametrize(("make", "types"), [(llama, 7), (gpt2, 4)])
def test_a_decoder_is_searched_without_its_pretrained_head(make, types):
    torch.manual_seed(0)
    model = make()
    before = state(model)
    found = search(model, language())
    assert_same(before, state(model))
    assert len(found.types) == types and found.config["trained"] == []
    assert torch.tensor(found.gamma_bar).std() > 0


def test_encoder_and_decoder_are_searched_together_or_one_of_them():
    torch.manual_seed(0)
    model = t5()
    before = state(model)
    both = search(model, language())
    assert_same(before, state(model))
    assert len(both.modules) == 4 and sum(both.sizes()) == 2 * 6 + 2 * 10
    assert {name.split(".")[0] for name in both.names()} == {"encoder", "decoder"}
    labels = [line.partition(":")[0] for line in str(both).splitlines()[1:]]
    assert labels == [f"{block}.block.* layer {n}" for block in ("encoder", "decoder") for n in (1, 2)]
    found = search(
        model, language(), layer="encoder.block.*", candidates=["layer.0.SelfAttention.q", "layer.1.DenseReluDense.wo"]
    )
    assert_same(before, state(model))
    assert found.modules[1] == ["encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo"]
    assert torch.tensor(found.gamma_bar).std() > 0


def test_fixed_positions_are_not_taken_for_what_the_user_froze():
    """Pegasus and others freeze their positions themselves."""
    small = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in SIZES.items()}
    sizes = {"vocab_size": 60, "d_model": 16, **small}
    torch.manual_seed(0)
    model = PegasusForConditionalGeneration(PegasusConfig(pad_token_id=0, decoder_start_token_id=0, **sizes))
    assert not all(p.requires_grad for p in model.parameters())
    batches = [{"input_ids": torch.randint(2, 60, (4, 8)), "labels": torch.randint(2, 60, (4, 6))} for _ in range(5)]
    assert search(model, batches).config["trained"] == []
    model.requires_grad_(False)
    model.model.encoder.layers[0].final_layer_norm.requires_grad_(True)
    names = [f"model.encoder.layers.0.final_layer_norm.{name}" for name in ("weight", "bias")]
    assert search(model, batches).config["trained"] == names


class OwnConfig(PreTrainedConfig):
    model_type = "own_kind"


@pytest.mark.parametrize("config", [BERT, OwnConfig()], ids=["BERT's", "own"])
@pytest.mark.parametrize("prefix", ["", "bert"])
def test_a_class_of_the_users_own_holds_its_backbone_under_any_name(config, prefix):
    class Own(PreTrainedModel):
        config_class = type(config)
        base_model_prefix = prefix

        def __init__(self):
            super().__init__(config)
            self.backbone = AutoModel.from_config(BERT)
            self.head = nn.Linear(16, 2)

        def forward(self, input_ids, labels):
            logits = self.head(self.backbone(input_ids).last_hidden_state[:, 0])
            return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 60, (4, 8)), "labels": torch.arange(4) % 2} for _ in range(5)]
    assert search(Own(), batches).config["trained"] == ["head.weight", "head.bias"]


def test_a_model_that_reads_weights_is_searched():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    model = MambaForCausalLM(MambaConfig(vocab_size=50, **sizes))
    tokens = torch.randint(0, 50, (5, 2, 6))
    found = search(model, [{"input_ids": t, "labels": t} for t in tokens])
    assert len({value for row in found.gamma_bar for value in row}) > 4  # all gates moved


# --- interrupted ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
@pytest.mark.parametrize("call", [0, 3])
def test_what_is_raised_in_the_loss_leaves_the_model_as_it_was(error, call):
    model, batches, _ = made("bert")
    before, calls = state(model), []

    def stops(model, batch):
        calls.append(batch)
        if len(calls) > call:
            raise error("mine")
        return model(**batch).loss

    with pytest.raises(error, match="mine"):
        search(model, batches, stops)
    assert_same(before, state(model))


def test_an_interrupt_between_two_adapters_leaves_none(monkeypatch):
    model, batches, loss = made("bert")
    before, made_pairs = state(model), []
    new_pair = core_attach.new_pair

    def interrupted(base, rank):
        made_pairs.append(base)
        if len(made_pairs) == 5:
            raise KeyboardInterrupt
        return new_pair(base, rank)

    monkeypatch.setattr(core_attach, "new_pair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(model, batches, loss)
    assert_same(before, state(model))


# --- heads ---


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        (lambda: [Block(), Block(), nn.Linear(8, 2)], ["2"]),
        (lambda: [nn.Linear(8, 8), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 2)], ["0", "3", "4"]),
    ],
)
def test_a_head_in_the_same_sequence_as_the_layers_is_trained(parts, trained):
    torch.manual_seed(0)
    found = search(nn.Sequential(*parts()), pairs(8), entropy_loss)
    assert found.config["trained"] == [f"{name}.{kind}" for name in trained for kind in ("weight", "bias")]


def test_layers_beside_the_chosen_ones_are_no_head_and_no_head_is_warned_about(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(Block() for _ in range(4))))
    assert search(model, pairs(8), entropy_loss, layer=["0.[0]", "0.[1]"]).config["trained"] == []
    assert "no head is trained with the adapters: if this model has one, name it (head=[…])" in caplog.text


def test_an_encoder_with_a_decoder_is_searched_and_its_adapter_loads(tmp_path):
    def two():
        torch.manual_seed(0)
        config = EncoderDecoderConfig.from_encoder_decoder_configs(BERT, BERT)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        return EncoderDecoderModel(config).eval()

    model = two()
    batches = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in texts()]
    with pytest.raises(
        UserError, match=r"does not call encoder\.encoder\.layer\.0\.crossattention\.self\.query \(and 7"
    ):
        search(model, batches, layer="encoder.encoder.layer.*")
    called = ["attention.self.query", "attention.self.value", "output.dense"]
    selection = search(model, batches, layer="encoder.encoder.layer.*", candidates=called)
    assert selection.config["trained"] == []  # all of it is pretrained
    diffora.attach(model, selection, rank=2)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt)
    diffora.save_adapter(model, tmp_path)
    loaded = two()
    diffora.load_adapter(loaded, tmp_path)
    found, wanted, plain = (each.eval()(**batches[0]) for each in (loaded, model, two()))
    assert found.logits.equal(wanted.logits)
    assert (plain.encoder_last_hidden_state - wanted.encoder_last_hidden_state).abs().max() > 0.1


def test_a_pretrained_decoder_with_its_own_head_is_no_new_head():
    from transformers import BlipConfig, BlipForConditionalGeneration

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BlipConfig(
        text_config=small | {"vocab_size": 50}, vision_config=small | {"image_size": 8, "patch_size": 4}
    )
    model = BlipForConditionalGeneration(config)
    assert pretrained_children(model) >= {"text_decoder", "vision_model"}


# --- layers of their own kinds ---


class Int8(nn.Linear):
    """A quantised layer without a weight."""

    def __init__(self, plain):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_buffer("scale", plain.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (plain.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.packed * self.scale)


class Pairwise(nn.Linear):
    """Adds up the halves of what it computes."""

    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, -1)).sum(-2)


def test_quantised_layers_without_a_weight_are_searched_and_selectors_of_weights_refuse_them():
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        block[0] = Int8(block[0])
    assert search(model, pairs(8), entropy_loss).rounds == 1
    with pytest.raises(UserError, match="the weight of a Int8 is quantised"):
        diffora.select(model, "kappa")


def test_a_layer_that_computes_something_else_than_a_product_is_refused():
    model = Net()
    for block in model.blocks:
        block[3] = Pairwise(12, 16)
    with pytest.raises(UserError, match=r"a Pairwise gives something else than a linear layer does.*candidates"):
        search(model, pairs(8), entropy_loss)


def test_a_spectral_norm_is_left_as_it_was():
    torch.manual_seed(0)
    model = Net()
    nn.utils.parametrizations.spectral_norm(model.blocks[0][0])
    before = state(model)
    diffora.find_grid(model)
    assert_same(before, state(model))


@pytest.mark.parametrize("has_head", [True, False])
def test_a_module_around_a_transformers_model_has_the_head_of_that_model(has_head):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bert() if has_head else bert().bert
            self.top = nn.Linear(2 if has_head else 16, 2)

        def forward(self, labels, **batch):
            output = self.net(**batch)
            return self.top(output.logits if has_head else output.pooler_output)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(**batch), batch["labels"])

    torch.manual_seed(0)
    found = search(Around(), texts(), loss)
    head = [f"net.{name}" for name, _ in bert().named_parameters() if name.startswith("classifier")]
    assert found.config["trained"] == [*(head if has_head else []), "top.weight", "top.bias"]
