"""The sanity check of saliency maps: what is randomised, how maps are compared, and whether the
verdict can tell a map of the network from one of the image."""
from copy import deepcopy

import numpy as np
import pytest
import torch
from monai.networks.nets import ResNet
from scipy.stats import spearmanr
from torch import nn

from synthpi.explain.saliency import Dimension, saliency_maps
from synthpi.models.encoders import make_encoder
from synthpi.explain.sanity import map_similarity, plot_sanity, sanity_check, shuffle_weights


def small(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        (
            net[1].weight.uniform_(0.5, 1.5),
            net[1].bias.uniform_(-0.2, 0.2),
            net[1].running_mean.uniform_(-0.2, 0.2),
        )
    return net.eval()


@pytest.fixture
def images(): return torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def test_weights_are_permuted_in_their_own_tensor():
    net = small()
    before = deepcopy(net.state_dict())
    shuffle_weights(net)
    # its own parameters only: a Sequential has none
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for k in (0, 1, 3): shuffle_weights(net[k], 5)
    again = small()
    for k in (0, 1, 3): shuffle_weights(again[k], 5)
    for k, v in net.state_dict().items():
        assert torch.equal(
            v.flatten().sort().values, before[k].flatten().sort().values
        ) and torch.equal(v, again.state_dict()[k])
        assert torch.equal(v, before[k]) == (k[0] not in "013" or "running" in k or "num" in k), k
    shuffle_weights(again[0], 6)
    assert not torch.equal(again[0].weight, net[0].weight)


def test_similarity_of_maps():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 16, 16))
    mixed = a + .7*b
    assert map_similarity(a, mixed)[0] == pytest.approx(
        spearmanr(np.abs(a), np.abs(mixed), axis=None).statistic
    )
    assert map_similarity(a, -2*a) == pytest.approx((1, 1))
    # nothing to rank
    for flat in (0 * a, 0 * a + 3):
        assert np.isnan(map_similarity(a, flat)).all() and np.isnan(map_similarity(flat, a)).all()
    # smaller than the usual window
    assert 0 < map_similarity(a, mixed)[1] < 1 and map_similarity(a[:, :4, :5], b[:, :4, :5])[1] < 1
    assert map_similarity(
        a[:1].repeat(9, 0).reshape(1, 9, 16, 16), -a[:1].repeat(9, 0).reshape(1, 9, 16, 16)
    ) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match=r"\(3, 16, 16\) and \(3, 8, 16\)"):
        map_similarity(a, b[:, :8])


def test_layers_become_random_from_the_output_to_the_input(images):
    net = small()
    before = deepcopy(net.state_dict())
    state = torch.get_rng_state()
    check = sanity_check(net, images, stages=9)
    assert torch.equal(state, torch.get_rng_state()) and all(
        torch.equal(before[k], v) for k, v in net.state_dict().items()
    )
    assert check.layers == ["7", "3", "1", "0"] and check.table.groupby("method").stage.apply(
        list
    ).to_dict() == {
        m: [0, 1, 2, 3, 4] for m in ("guided_gradcam", "gradcam", "guided_backprop", "gradient")
    }
    table = check.table.set_index(["method", "stage"])
    assert (
        table.loc[("gradient", 2), "layer"] == "3"
        and np.allclose(table.spearman.xs(0, level=1), 1)
        and np.allclose(table.ssim.xs(0, level=1), 1)
    )
    assert (table.spearman_low <= table.spearman + 1e-9).all() and (
        table.spearman <= table.spearman_high + 1e-9
    ).all()
    # by hand: the net with its last layer and last convolution shuffled, asked for the classes that
    # the intact one predicted
    from synthpi.core.seeds import seed_for
    with torch.no_grad(): classes = net(images).argmax(1)
    hand = deepcopy(net)
    for k in (7, 3): shuffle_weights(hand[k], seed_for(0, str(k)))
    ours, expected = saliency_maps(net, images, classes), saliency_maps(hand, images, classes)
    for m in ours:
        pairs = [map_similarity(a, b) for a, b in zip(ours[m].numpy(), expected[m].numpy())]
        assert table.loc[(m, 2), ["spearman", "ssim"]].tolist() == pytest.approx(
            np.mean(pairs, 0).tolist()
        )
        assert np.array_equal(check.maps[m][2], expected[m][:3].numpy())
        other = [
            map_similarity(a, b)[0] for a, b in zip(ours[m].numpy(), np.roll(ours[m].numpy(), 1, 0))
        ]
        assert check.other.spearman[m] == pytest.approx(np.mean(other))
    assert len(sanity_check(net, images, 0, stages=2, methods=["gradient"]).table) == 3


def test_the_verdict(images):
    passing = sanity_check(small(), images, methods=["gradient"])
    assert passing.left()["gradient"] < .5
    blind = small()
    with torch.no_grad():
        # entries that are all alike cannot change places
        for p in blind.parameters(): p.fill_(.1)
    failing = sanity_check(blind, images, 1, methods=["gradient", "guided_backprop"])
    assert np.allclose(failing.table.spearman, 1) or (failing.table.zero == 1).all()
    assert failing.passes().eq(False).all() and (failing.left() > .99).all()
    assert (
        "**gradient does not pass**" in failing.verdict()
        and "100% of the likeness is left" in failing.verdict()
    )
    table = passing.table.copy()
    # (.36 - .2)/(1 - .2) = .2, the limit
    for rho, ok in ((.36 - 1e-6, True), (.36 + 1e-6, False)):
        table.loc[table.stage == table.stage.max(), "spearman"] = rho
        check = type(passing)(
            table,
            passing.other.assign(spearman=0.2),
            passing.maps,
            passing.images,
            passing.layers,
            0.2,
        )
        assert check.passes()["gradient"] == ok and ("**gradient passes**" in check.verdict()) == ok


def test_empty_maps_are_counted(images):
    dead = small()
    with torch.no_grad(): dead[7].weight.zero_()
    check = sanity_check(dead, images, 0, methods=["gradcam"], stages=2)
    assert (
        (check.table.zero == 1).all()
        and check.table.spearman.isna().all()
        and check.passes()["gradcam"] is None
        and "**gradcam cannot be judged**" in check.verdict()
    )
    plot_sanity(check).draw_without_rendering()


def test_images_whose_first_map_is_zero_are_left_out(images, monkeypatch):
    import synthpi.explain.sanity as room
    true, calls = room.saliency_maps, []
    def some(*args):
        maps = true(*args)
        calls.append(1)
        for m in maps.values(): m[slice(0, 2) if len(calls) == 1 else slice(4, 6)] = 0
        return maps
    monkeypatch.setattr(room, "saliency_maps", some)
    table = sanity_check(small(), images, methods=["gradient"], stages=2).table
    assert (
        table.n.tolist() == [4, 2, 2]
        and table.zero.round(3).tolist() == [0.333] * 3
        and table.spearman[0] == pytest.approx(1)
        and table.spearman[1] <= 0.5
    )
    by_hand = table.spearman[2]
    monkeypatch.setattr(room, "saliency_maps", true)
    # the images whose maps are zero neither at first nor later
    net, (a, b) = small(), (2, 4)
    with torch.no_grad(): classes = net(images).argmax(1)
    hand = deepcopy(net)
    for k in (7, 3, 1, 0): shuffle_weights(hand[k], room.seed_for(0, str(k)))
    pairs = [
        map_similarity(m, n)[0]
        for m, n in zip(
            saliency_maps(net, images, classes)["gradient"][a:b].numpy(),
            saliency_maps(hand, images, classes)["gradient"][a:b].numpy(),
        )
    ]
    assert by_hand == pytest.approx(np.mean(pairs))
    monkeypatch.setattr(room, "saliency_maps", some)
    calls.clear()
    assert (
        "33% of its last maps are zero"
        in sanity_check(small(), images, methods=["gradient"], stages=2).verdict()
    )


def test_maps_that_vanish_are_no_proof(images, monkeypatch):
    import synthpi.explain.sanity as room
    true, calls = room.saliency_maps, []
    def vanish(*args):
        maps = true(*args)
        calls.append(1)
        # at the last stage one map is left
        for m in maps.values(): m[1 if len(calls) > 2 else 6:] = 0
        return maps
    monkeypatch.setattr(room, "saliency_maps", vanish)
    check = sanity_check(small(), images, methods=["gradient"], stages=2)
    assert (
        check.table.n.tolist() == [6, 6, 1]
        and np.isnan(check.left()["gradient"])
        and check.passes().to_dict() == {"gradient": None}
    )
    assert (
        "**gradient cannot be judged**: with all 4 layers random only 1 of 6 maps"
        in check.verdict()
        and "pass" not in check.verdict()
    )
    plot_sanity(check).draw_without_rendering()


def test_volumes_and_embeddings():
    torch.manual_seed(0)
    net = make_encoder("resnet10_narrow", in_channels=1, spatial_dims=3)
    check = sanity_check(
        net,
        torch.rand(3, 1, 12, 12, 16),
        Dimension(3),
        methods=["guided_gradcam", "gradient"],
        stages=3,
    )
    fig = plot_sanity(check, 2)
    fig.draw_without_rendering()
    assert sum(
        len(ax.images) for sub in fig.subfigs for ax in sub.axes
    ) == 1 + 2 * 4 and fig.subfigs[0].axes[0].get_title().startswith("plane")
    assert len(check.layers) == len(
        [
            m
            for m in net.modules()
            if m._parameters and any(p is not None for p in m._parameters.values())
        ]
    )


def test_figure_and_refusals(images):
    check = sanity_check(small(), images, stages=3, keep=2)
    fig = plot_sanity(check, 1)
    assert [ax.get_title() for ax in fig.subfigs[0].axes[:6]] == [
        "input",
        "intact",
        "1 of 4",
        "2 of 4",
        "4 of 4",
        "",
    ]
    lines = fig.subfigs[1].axes[0].lines
    assert (
        lines[0].get_ydata().tolist()
        == check.table[check.table.method == "guided_gradcam"].spearman.tolist()
        and [t.get_text() for t in fig.subfigs[1].legends[0].get_texts()][0] == "Guided-GradCAM"
    )
    with pytest.raises(ValueError, match="image 2; 2 were kept"): plot_sanity(check, 2)
    with pytest.raises(ValueError, match="images=1"): sanity_check(small(), images[:1])
    with pytest.raises(ValueError, match="stages=1"): sanity_check(small(), images, stages=1)
    with pytest.raises(ValueError, match="layers with weights that ran=1"):
        sanity_check(
            nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            images,
        )
    with pytest.raises(ValueError, match="gelu"):
        sanity_check(
            nn.Sequential(
                nn.Conv2d(3, 2, 3),
                nn.GELU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(2, 2),
            ),
            images,
        )


def test_a_deep_network_keeps_its_scale():
    torch.manual_seed(0)
    net = ResNet(
        "basic", [2, 2, 2, 2], [8, 16, 32, 64], spatial_dims=2, n_input_channels=3, num_classes=3
    ).eval()
    check = sanity_check(net, torch.rand(4, 3, 48, 48), stages=2, methods=["gradient"])
    assert (check.table.zero == 0).all() and all(
        np.isfinite(m).all() for m in check.maps["gradient"].values()
    )
