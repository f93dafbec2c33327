import pytest
import torch
from conftest import TYPES
from torch import nn

from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.parts import guess_roles, part_of
from diffora.errors import UserError


class Block(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 3))


def model(*blocks: Block) -> nn.Module:
    root = nn.Module()
    root.encoder = nn.Module()
    root.encoder.layer = nn.ModuleList(blocks)
    root.head = nn.Linear(3, 2)
    return root


def test_grid_of_a_deberta(deberta):
    grid = find_grid(deberta(layers=3), "encoder.layer.*", TYPES)
    assert (grid.n_layers, grid.n_types) == (3, 6)
    assert grid.names[1][3] == "deberta.encoder.layer.1.attention.output.dense"
    assert grid.names[1][5] == "deberta.encoder.layer.1.output.dense"  # and not attention.output.dense
    assert grid.shapes[0] == ((16, 16),) * 4 + ((16, 32), (32, 16))


def test_layers_are_in_numerical_order():
    grid = find_grid(model(*(Block("q") for _ in range(12))), "encoder.layer.*", ["q"])
    assert [row[0] for row in grid.names] == [f"encoder.layer.{i}.q" for i in range(12)]


def test_blocks_of_one_stack_are_in_the_order_of_its_layers():
    net = model(*(Block(*(["q", "k"] if i % 2 else ["up", "down"])) for i in range(4)))
    grid = find_grid(net, ["encoder.layer.[0,2]", "encoder.layer.[1,3]"])
    assert grid.layers == tuple(f"encoder.layer.{i}" for i in range(4))
    assert [[name and name.rpartition(".")[2] for name in row] for row in grid.names] == [
        ["up", "down", None, None],
        [None, None, "q", "k"],
    ] * 2
    assert [[shape is None for shape in row] for row in grid.shapes] == [[n is None for n in row] for row in grid.names]


def test_no_match_lists_near_misses():
    with pytest.raises(UserError) as error:
        find_grid(model(Block("query", "key")), "encoder.layer.*", ["querry"])
    assert "no linear layer matches encoder.layer.*.querry" in str(error.value)
    assert "encoder.layer.*.query, encoder.layer.*.key, head" in str(error.value)


def test_a_ragged_grid_names_the_layers():
    with pytest.raises(UserError, match=r"encoder\.layer\.\*\.key is missing in layer\(s\) 1, 3"):
        find_grid(
            model(*(Block("query", *["key"][: i % 2 == 0]) for i in range(4))), "encoder.layer.*", ["query", "key"]
        )


def test_all_problems_come_at_once():
    with pytest.raises(UserError) as error:
        find_grid(model(Block("q", "k"), Block("q")), "encoder.layer.*", ["q", "k", "nope"])
    assert "k is missing in layer(s) 1" in str(error.value) and "nope" in str(error.value)


def test_modules_that_are_not_linear_are_refused():
    block = Block("q")
    block.norm = nn.LayerNorm(3)
    with pytest.raises(UserError, match=r"encoder.layer.0.norm is a LayerNorm"):
        find_grid(model(block), "encoder.layer.*", ["norm"])


@pytest.mark.parametrize("layer", ["encoder.layer.0", "encoder.*.*"])
def test_the_layer_pattern_needs_one_star(layer):
    with pytest.raises(UserError, match="exactly one"):
        find_grid(model(Block("q")), layer, ["q"])


def test_some_layers_can_be_named_by_their_numbers():
    net = model(*(Block("q", "k") for _ in range(12)))
    assert find_grid(net, "encoder.layer.[1,10]", ["q"]).layers == ("encoder.layer.1", "encoder.layer.10")
    assert find_grid(net, "encoder.layer.[3]", ["q", "k"]).names == (("encoder.layer.3.q", "encoder.layer.3.k"),)


def test_two_stacks_are_distinguished_by_their_path():
    both = nn.ModuleDict({"a": model(Block("q")), "b": model(Block("q"))})
    with pytest.raises(UserError, match=r"matches both a\.encoder"):
        find_grid(both, "encoder.layer.*", ["q"])
    assert find_grid(both, "b.encoder.layer.*", ["q"]).names == (("b.encoder.layer.0.q",),)


def test_roles_are_given_or_guessed_and_checked(deberta):
    net = deberta()
    grid = find_grid(net, "encoder.layer.*", ["intermediate.dense"], {"ffn_output": "intermediate.dense"}, "model.")
    assert grid.having("ffn_output") == [f"deberta.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]  # as given
    assert grid.having("key") == [f"deberta.encoder.layer.{i}.attention.self.key_proj" for i in (0, 1)]
    with pytest.raises(UserError, match=r"its gate: say so with \+model\.roles\.gate=…, where a layer has interm"):
        grid.having("gate")
    with pytest.raises(UserError, match=r"model\.roles\.key=nope: deberta\.encoder\.layer\.0\.nope is not a linear"):
        find_grid(net, "encoder.layer.*", ["intermediate.dense"], {"key": "nope"}, "model.")
    with pytest.raises(UserError, match=r"its gate: say so with roles\.gate=…"):
        find_grid(net, "encoder.layer.*", ["intermediate.dense"]).having("gate")


# --- without a pattern ---


def stack(*layers: list[str], sizes: dict[str, tuple[int, int]] | None = None) -> nn.ModuleList:
    """Numbered layers with linear modules at the given paths."""
    result = nn.ModuleList()
    for paths in layers:
        layer = nn.Module()
        for path in paths:
            parent = layer
            *above, last = path.split(".")
            for name in above:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            parent.add_module(last, nn.Linear(*(sizes or {}).get(last, (4, 4))))
        result.append(layer)
    return result


def holding(**parts: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, part in parts.items():
        root.add_module(name, part)
    return root


def message(net: nn.Module, **given) -> str:
    with pytest.raises(UserError) as error:
        find_grid(net, prefix="model.", **given)
    return str(error.value)


def test_only_the_layers_are_found_not_the_modules_around_them():
    net = holding(
        embed=nn.Linear(4, 4), layers=stack(*[["attn.q", "mlp.up"]] * 12), pooler=nn.Linear(4, 4),
        head=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), proj2=stack(["q"])[0],
    )  # fmt: skip
    grid = find_grid(net)
    assert grid.types == ("attn.q", "mlp.up") and grid.n_layers == 12
    assert grid.names[10] == ("layers.10.attn.q", "layers.10.mlp.up") and grid.layers[11] == "layers.11"


def test_modules_with_numbered_names_count_as_layers():
    layers = stack(*[["q"]] * 3)
    grid = find_grid(holding(encoder=holding(**{f"block_{i + 1}": layer for i, layer in enumerate(layers)})))
    assert [row[0] for row in grid.names] == [f"encoder.block_{i}.q" for i in (1, 2, 3)]
    assert find_grid(holding(layers=stack(["q"]))).n_layers == 1


def test_given_patterns_restrict_the_grid():
    net = holding(text=stack(["q", "k"], ["q", "k"]), image=stack(["q", "v"], ["q", "v"]))
    assert find_grid(net, layer="image.*").types == ("q", "v")
    assert find_grid(net, candidates=["k"]).names == (("text.0.k",), ("text.1.k",))
    assert find_grid(net, candidates=["v", "q"]).names[0] == ("image.0.v", "image.0.q")
    assert "no numbered layers that have q, nope" in message(net, candidates=["q", "nope"])
    assert "no linear layer matches sound.*" in message(net, layer="sound.*")
    assert "model.layer='text' must have exactly one" in message(net, layer="text")


def test_messages_name_arguments_with_the_prefix_that_is_given():
    net = holding(text=stack(*[["q"]] * 2), image=stack(*[["q"]] * 2))
    for prefix in ("", "model."):
        with pytest.raises(UserError) as error:
            find_grid(net, prefix=prefix)
        assert f"'{prefix}layer=text.*' (2 layers" in str(error.value)
        with pytest.raises(UserError, match=f"^{prefix}layer='a' must have"):
            find_grid(net, "a", prefix=prefix)


def test_with_several_stacks_the_user_chooses_unless_one_is_much_larger():
    text, image = stack(*[["q", "k"]] * 3), stack(*[["q"]] * 2)
    said = message(holding(towers=holding(text=holding(layers=text), image=holding(layers=image))))
    assert "has 2 stacks of layers" in said
    for layer, n, words in (("text.layers.*", 3, "3 layers with 2"), ("image.layers.*", 2, "2 layers with 1")):
        assert f"'model.layer={layer}' ({words} linear modules)" in said
        towers = holding(towers=holding(text=holding(layers=text), image=holding(layers=image)))
        assert find_grid(towers, layer=layer).n_layers == n
    assert find_grid(holding(text=stack(*[["q", "k"]] * 10), image=image)).n_layers == 10


def test_layers_that_differ_are_named_with_the_possible_choices():
    net = holding(layers=stack(["mamba.proj", "ffn.up"], ["attn.q", "ffn.up"], ["mamba.proj", "ffn.up"]))
    said = message(net)
    assert "the layers of layers.* differ: layers.0 has mamba.proj" in said
    choices = [line.strip().removeprefix("'model.candidates=[").split("]'") for line in said.splitlines()[2:]]
    assert choices == [["ffn.up", " (3 layers)"], ["mamba.proj", " (2 layers)"], ["attn.q", " (1 layers)"]]
    assert find_grid(net, candidates=["mamba.proj"]).layers == ("layers.0", "layers.2")
    assert find_grid(net, candidates=["ffn.up"]).n_layers == 3
    assert "layers.*.attn.q is missing in layer(s) 0, 2" in message(net, candidates=["ffn.up", "attn.q"])


def test_blocks_inside_stages_are_listed_for_each_stage():
    def stage(n: int) -> nn.Module:
        return holding(blocks=stack(*[["attn.q", "mlp.up"]] * n))

    net = holding(stages=nn.ModuleList([stage(2), stage(4)]))
    said = message(net)
    assert "repeat blocks.* inside them" in said
    assert said.index("'model.layer=stages.1.blocks.*' (4 layers") < said.index("'model.layer=stages.0.blocks.*' (2 l")
    assert find_grid(net, layer="stages.1.blocks.*").names[3] == (
        "stages.1.blocks.3.attn.q",
        "stages.1.blocks.3.mlp.up",
    )


@pytest.mark.parametrize("as_parameters", [False, True])
def test_experts_and_their_router_are_not_candidates_by_default(as_parameters):
    layers = stack(*[["attn.q", "moe.gate", "moe.shared.up"]] * 2, sizes={"gate": (4, 3)})
    for layer in layers:
        if as_parameters:
            layer.moe.experts = nn.ParameterDict({"up": nn.Parameter(torch.zeros(3, 4, 4))})
        else:
            layer.moe.experts = stack(*[["up"]] * 3)
        layer.conv = nn.Conv1d(4, 4, 3)  # has three dimensions too, but is an ordinary module
    said = message(holding(layers=layers))
    assert ("weights outside linear modules: moe.experts.up" if as_parameters else "repeat moe.experts.*") in said
    assert "conv" not in said
    assert "'model.candidates=[attn.q,moe.shared.up]' (2 layers)" in said
    assert find_grid(holding(layers=layers), candidates=["attn.q", "moe.gate"]).n_types == 2  # possible if named


def test_weights_left_out_of_the_grid_are_named(caplog):
    """B15: attention was left out without a message, because `nn.MultiheadAttention` calls no linear layers."""
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3)
    net.layers[1].norm1.extra = nn.Embedding(3, 4)  # an embedding is not a matrix to multiply with
    grid = find_grid(net)
    assert grid.types == ("linear1", "linear2")
    assert grid.left_out == ("layers.*.self_attn.in_proj_weight", "layers.*.self_attn.out_proj.weight")
    (line,) = caplog.messages
    assert line.startswith("left out of the grid") and all(name in line for name in grid.left_out)
    caplog.clear()
    assert find_grid(net, candidates=["linear1"]).left_out == grid.left_out and not caplog.messages  # as asked for


def test_other_matrices_and_small_stacks_left_out_of_the_grid_are_named(caplog):
    text, image = stack(*[["q"]] * 20), stack(["q"])
    for i, layer in enumerate(text):
        layer.table, layer.scale = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(1, 1, 5))
        layer.conv, layer.name = nn.Conv1d(2, 2, 3), f"{i}"
    assert find_grid(holding(text=text, image=image)).left_out == ("text.*.table", "image.*")
    assert len(caplog.messages) == 1
    assert find_grid(holding(text=text, image=image), layer="text.*").left_out == ("text.*.table",)
    caplog.clear()
    assert find_grid(holding(layers=stack(*[["q", "k"]] * 3))).left_out == () and not caplog.messages


def test_a_module_under_two_names_in_a_layer_is_one_candidate():
    layers = stack(*[["q", "k"]] * 2)
    for layer in layers:
        layer.k = layer.q
    assert find_grid(holding(layers=layers)).types == ("q",)
    said = message(holding(layers=layers), layer="layers.*", candidates=["q", "k"])
    assert "layers.0.k is the same module as another one" in said


def test_a_module_that_several_layers_share_is_adapted_once_or_not_at_all():
    layers = stack(*[["q", "k"]] * 12)
    layers[11].q = layers[10].q
    said = message(holding(layers=layers))
    assert "layers.11.q is the same module as layers.10.q: leave q out" in said
    assert find_grid(holding(layers=layers), candidates=["k"]).n_layers == 12
    assert find_grid(holding(layers=layers), layer="layers.[10]").types == ("q", "k")
    repeated = stack(["q"])[0]
    assert find_grid(holding(layers=nn.ModuleList([repeated] * 6))).names == (("layers.0.q",),)  # one layer, six times


@pytest.mark.parametrize("layer", ["layers.*", "."])
def test_a_candidate_that_is_named_twice_is_refused(layer):
    assert "model.candidates names q twice" in message(holding(layers=stack(["q"])), layer=layer, candidates=["q", "q"])


def test_a_model_of_linear_layers_alone_says_how_to_name_them():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    said = message(net)
    assert "this model has no numbered layers" in said and "model.layer='.' and model.candidates=[0,1]" in said
    assert "layers.0 is a linear layer itself: use model.layer='.'" in message(holding(layers=net), layer="layers.*")
    assert "model.layer='.' needs model.candidates" in message(net, layer=".")
    assert find_grid(net, layer=".", candidates=["0", "1"]).names == (("0", "1"),)


# --- by name ---

# The module names of each family with their roles; "" if the name does not show the role.
FAMILIES = {
    "bert": "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
    "output.dense",
    "deberta": "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.output.dense "
    "intermediate.dense output.dense",
    "distilbert": "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2",
    "vit": "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2",
    "opt": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    "t5": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v layer.0.SelfAttention.o "
    "layer.1.DenseReluDense.wi layer.1.DenseReluDense.wo",
}
FUSED = {
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "modernbert": "attn.Wqkv attn.Wo mlp.Wi mlp.Wo",
    "gpt_neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
}


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_parts_and_roles_by_the_names_of_each_family(family):
    separate = family in FAMILIES
    paths = (FAMILIES | FUSED)[family].split()
    first = ["query", "key", "value"] if separate else ["query_key_value"]
    assert [part_of(path) for path in paths] == [*first, "attention_output", "ffn_input", "ffn_output"]
    roles = {"attention_output": paths[-3], "ffn_output": paths[-1]}
    assert guess_roles(paths) == roles | ({"key": paths[1], "value": paths[2]} if separate else {})


def test_roles_are_guessed_only_if_they_are_certain():
    decoder = ["self_attn.k_proj", "encoder_attn.k_proj", "self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2"]
    assert part_of("encoder_attn.k_proj") == part_of("layer.1.EncDecAttention.k") == "cross_key"
    assert guess_roles(decoder) == {"ffn_output": "fc2"}
    for path in ("mixer.out_proj", "attention.projection", "wk", "key", "sequence_attn_x.w"):
        assert part_of(path) is None


def test_modules_of_an_adapter_are_not_candidates():
    """This includes PEFT's adapters. Otherwise their A and B would get adapters too."""
    from peft import LoraConfig, inject_adapter_in_model

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2))

    ours, theirs = Layers(), Layers()
    attach(ours, [["layers.0.a"], ["layers.1.a"]], torch.ones(2, 1, dtype=torch.bool), 2, None, 4)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["a"]), theirs)
    for model, inner in ((ours, "base"), (theirs, "lora_A.default")):
        with pytest.raises(UserError, match="belongs to an adapter that is on this model already"):
            find_grid(model)
        with pytest.raises(UserError, match="has a low-rank layer already"):
            attach(model, [[f"layers.0.a.{inner}"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
        assert find_grid(model, "layers.*", ["b"]).types == ("b",)
