"""The picture of a DAM: what its colours, frames and numbers say."""

import dataclasses

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from diffora.core.dam import RELAXATIONS
from diffora.core.picture import STARTS, colour_range
from diffora.core.selection import Selection


@pytest.fixture
def searched():
    return Selection(
        method="standalone",
        selector="search",
        types=["q", "k", "v"],
        modules=[[f"{i}.{t}" for t in "qkv"] for i in range(2)],
        selected=[["q"], ["v"]],
        k=1,
        rho=1 / 3,
        seed=0,
        gamma_bar=[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]],
        relaxation="softmax",
    )


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def test_the_start_of_the_gates_is_that_of_each_relaxation():
    assert STARTS.keys() == RELAXATIONS.keys()


def colours(axes):
    """The colours of the cells, types x layers, as (red, green, blue, opacity)."""
    (image,) = axes.images
    return image.cmap(image.norm(image.get_array()))


def is_white(colour):
    return all(part > 0.93 for part in colour[:3])


@pytest.mark.parametrize(("relaxation", "start"), [("softmax", 1 / 3), ("sigmoid", 0.5)])
def test_red_is_above_the_start_of_the_search_and_blue_below(searched, relaxation, start):
    gates = [[start, start + 0.1, start - 0.1]] * 2
    cells = colours(dataclasses.replace(searched, gamma_bar=gates, relaxation=relaxation).plot())
    assert is_white(cells[0][0])
    assert cells[1][0][0] > cells[1][0][2] and cells[2][0][2] > cells[2][0][0]
    assert colour_range(gates, start) == pytest.approx((start, 0.1))
    unmoved = [[float(torch.tensor(start)) for _ in range(3)]] * 2  # rounded to float32, 5e-9 from the start
    assert all(
        is_white(cell)
        for row in colours(dataclasses.replace(searched, gamma_bar=unmoved, relaxation=relaxation).plot())
        for cell in row
    )


@pytest.mark.parametrize("scores", [[[3.0, 1.0, 2.0], [30.0, 10.0, 20.0]], [[-1.0, -3.0, -2.0]] * 2])
def test_scores_are_white_at_the_lowest_and_never_blue(searched, scores):
    cells = colours(dataclasses.replace(searched, gamma_bar=None, relaxation=None, scores=scores).plot())
    assert is_white(cells[1][0]) and not is_white(cells[0][0])
    assert all(cell[0] >= cell[2] for row in cells for cell in row)


def test_confidence_is_pale_where_a_module_is_undecided_and_its_frame_is_dashed(searched):
    sure = [[0.97, 0.5, 0.02], [0.1, 0.3, 0.6]]
    axes = dataclasses.replace(searched, gamma_bar=None, ensemble=5, confidence=sure).plot()
    cells = colours(axes)
    assert is_white(cells[1][0])
    assert cells[0][0][0] > 2 * cells[0][0][2] and cells[2][0][2] > 2 * cells[2][0][0]  # dark red, dark blue
    assert [p.get_linestyle() == "solid" for p in axes.patches if isinstance(p, Rectangle)] == [True, False]
    assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for row in sure for value in row]
    assert "ensemble of 5" in axes.get_title() and "dashed" in axes.get_title()


def test_colours_of_confidence_do_not_depend_on_the_other_modules(searched):
    close = dataclasses.replace(searched, gamma_bar=None, ensemble=2, confidence=[[0.5, 0.52, 0.48]] * 2).plot()
    assert all(part > 0.9 for row in colours(close) for cell in row for part in cell[:3])  # and not dark red and blue


def test_modules_that_a_layer_lacks_stay_blank_in_a_picture_of_confidence(searched):
    modules, sure = [["0.q", None, "0.v"], ["1.q", "1.k", "1.v"]], [[1.0, None, 0.0], [0.1, 0.3, 0.6]]
    lacking = dataclasses.replace(searched, modules=modules, gamma_bar=None, ensemble=3, confidence=sure)
    axes = lacking.plot()
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.00", "0.10", "0.30", "0.60"]
    assert colours(axes)[1][0][3] == 0  # transparent


def test_equal_scores_can_be_drawn(searched):
    assert is_white(colours(dataclasses.replace(searched, gamma_bar=None, scores=[[1.0] * 3] * 2).plot())[0][0])


def test_frames_labels_and_numbers_are_those_of_the_selection(searched):
    axes = searched.plot()
    assert isinstance(axes, Axes) and axes.figure in map(plt.figure, plt.get_fignums())
    frames = [(round(p.get_x() + 0.45), round(p.get_y() + 0.43)) for p in axes.patches if isinstance(p, Rectangle)]
    assert frames == [(0, 0), (1, 2)]
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.30", "0.20", "0.10", "0.20", "0.70"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["q", "k", "v"]
    assert axes.get_title().startswith("selector search, K = 1\n")
    run = dataclasses.replace(searched, method="diffora", k=None)
    assert run.plot().get_title().startswith("diffora, selector search, 2 of 6\n")


def test_a_selection_without_gates_or_scores_shows_frames_only(searched):
    axes = dataclasses.replace(searched, gamma_bar=None).plot(title="given")
    assert not axes.images and not axes.texts and len(axes.patches) == 2 and axes.get_title() == "given"


def test_it_draws_on_the_axes_it_is_given_and_opens_no_window(searched):
    figure, axes = plt.subplots(1, 2)
    assert searched.plot(ax=axes[1]) is axes[1]
    assert axes[1].images and not axes[0].images and plt.get_fignums() == [figure.number]


def test_many_layers_get_narrow_cells_without_numbers(searched):
    many = dataclasses.replace(
        searched,
        modules=[[f"{i}.{t}" for t in "qkv"] for i in range(80)],
        selected=[["q"]] * 80,
        gamma_bar=[[0.5, 0.3, 0.2]] * 80,
    )
    axes = many.plot()
    assert not axes.texts and len(axes.patches) == 80 and len(axes.get_xticks()) == 80
    assert axes.figure.get_size_inches()[0] < 24
