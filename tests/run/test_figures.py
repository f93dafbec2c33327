import dataclasses

import pytest

from diffora.core.parts import short_names
from diffora.core.picture import shares
from diffora.core.selection import Selection
from diffora.run.figures import dam_heatmap


@pytest.fixture
def scored():
    return Selection(
        method="diffora",
        selector="gradient",
        types=["a", "b"],
        modules=[["0.a", "0.b"], ["1.a", "1.b"]],
        selected=[["a"], ["b"]],
        k=1,
        rho=0.5,
        seed=0,
        scores=[[3.0, 1.0], [20.0, 60.0]],
    )


def test_scores_compared_within_a_layer_are_shown_as_shares_of_the_layer(scored):
    assert shares(scored.scores, True) == [[0.75, 0.25], [0.25, 0.75]]


def test_scores_compared_over_all_layers_keep_their_order(scored):
    assert shares(scored.scores, False) == [[3 / 42, 1 / 42], [20 / 42, 60 / 42]]


def test_scores_that_are_all_zero_cause_no_division_by_zero(scored):
    assert shares([[0.0, 0.0], [1.0, 1.0]], True) == [[0.0, 0.0], [0.5, 0.5]]


def test_the_picture_shows_the_scores(scored):
    plain = dam_heatmap(dataclasses.replace(scored, scores=None))
    other = dam_heatmap(dataclasses.replace(scored, scores=[[1.0, 3.0], [20.0, 60.0]]))
    assert len({plain, other, dam_heatmap(scored), dam_heatmap(dataclasses.replace(scored, k=None))}) == 4
    assert dam_heatmap(scored).startswith(b"\x89PNG")


def test_the_picture_is_centred_on_the_gate_at_zero(scored):
    """The neutral gate of each relaxation is drawn white. The two relaxations have different neutral gates."""
    half = dataclasses.replace(scored, scores=None, gamma_bar=[[0.5, 0.5], [0.5, 0.5]])
    three = dataclasses.replace(half, types=["a", "b", "c"], modules=[["a", "b", "c"]] * 2, gamma_bar=[[0.5] * 3] * 2)
    assert dam_heatmap(dataclasses.replace(half, relaxation="sigmoid")) == dam_heatmap(half)  # 1/N is 1/2
    assert dam_heatmap(dataclasses.replace(three, relaxation="sigmoid")) != dam_heatmap(three)


@pytest.mark.parametrize(
    ("types", "labels"),
    [
        ("attention.self.query_proj attention.self.key attention.output.dense output.dense", "Q|K|attn. out|FFN out"),
        ("self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
         "V|attn. out|FFN gate|FFN up|FFN out"),
        ("attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", "QKV|attn. out|FFN in|FFN out"),
        ("layer.0.SelfAttention.q layer.1.EncDecAttention.q", "Q|cross Q"),
        ("mlp.up_proj mlp.shared.up_proj mixer.x_proj", "mlp.up_proj|mlp.shared.up_proj|mixer.x_proj"),
    ],
)  # fmt: skip
def test_labels_are_as_short_as_possible_and_never_equal(types, labels):
    assert short_names(types.split()) == labels.split("|")
