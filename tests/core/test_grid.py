import pytest
from conftest import TYPES
from torch import nn

from diffora.core.grid import find_grid
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


def test_what_is_not_linear_is_refused():
    block = Block("q")
    block.norm = nn.LayerNorm(3)
    with pytest.raises(UserError, match=r"encoder.layer.0.norm is a LayerNorm"):
        find_grid(model(block), "encoder.layer.*", ["norm"])


@pytest.mark.parametrize("layer", ["encoder.layer.0", "encoder.*.*"])
def test_the_layer_pattern_needs_one_star(layer):
    with pytest.raises(UserError, match="exactly one"):
        find_grid(model(Block("q")), layer, ["q"])


def test_two_stacks_are_told_apart_by_their_path():
    both = nn.ModuleDict({"a": model(Block("q")), "b": model(Block("q"))})
    with pytest.raises(UserError, match=r"matches both a\.encoder"):
        find_grid(both, "encoder.layer.*", ["q"])
    assert find_grid(both, "b.encoder.layer.*", ["q"]).names == (("b.encoder.layer.0.q",),)


def test_roles_are_found_in_every_layer_and_checked(deberta):
    net = deberta()
    grid = find_grid(net, "encoder.layer.*", ["intermediate.dense"], {"ffn_output": "output.dense"})
    assert grid.having("ffn_output") == [f"deberta.encoder.layer.{i}.output.dense" for i in (0, 1)]
    with pytest.raises(UserError, match=r"say so in model\.roles\.key"):
        grid.having("key")
    with pytest.raises(UserError, match=r"model\.roles\.key=nope: deberta\.encoder\.layer\.0\.nope is not a linear"):
        find_grid(net, "encoder.layer.*", ["intermediate.dense"], {"key": "nope"})
