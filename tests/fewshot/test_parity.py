"""The reference code's numbers, from its formulas in plain loops with OpenCV's solver.

Cost: 1 - cosine of nodes after each loses its own channel mean. Weights: relu of the product with
the other map's mean, of raw features, plus 1e-3; the OpenCV path rectifies again and adds 1e-5,
then scales to the number of nodes. Logits: sum of similarity times flow, times 12.5 over it.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from emd_retrieval.features import pyramid_pool
from emd_retrieval.features.grid import GridLayout
from emd_retrieval.fewshot import SFC_REFERENCE, EMDNearest, FineTuning, StructuredFC
from emd_retrieval.matching import EMDMatcher

REFERENCE = EMDMatcher(
    ground_cost="centered_cosine",
    weight_floor=1e-3 + 1e-5,
    weight_floor_scale="absolute",
    weight_gradient=False,
)


def plain_weights(nodes: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    mean = other.mean(dim=0)
    weights = [max(float((node * mean).sum()), 0.0) + 1e-3 for node in nodes]
    weights = [max(weight, 0.0) + 1e-5 for weight in weights]
    return np.array([w * len(weights) / sum(weights) for w in weights], np.float32)


def plain_similarity_map(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    rows = []
    for u in left:
        row = []
        for v in right:
            a, b = u - u.mean(), v - v.mean()
            row.append((a * b).sum() / (a.norm() * b.norm()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def plain_logit(query: torch.Tensor, proto: torch.Tensor) -> torch.Tensor:
    similarity = plain_similarity_map(query, proto)
    cost = (1 - similarity).detach().numpy().astype(np.float32)
    supply = plain_weights(query.detach(), proto.detach())
    demand = plain_weights(proto.detach(), query.detach())
    _, _, flow = cv2.EMD(supply[:, None], demand[:, None], cv2.DIST_USER, cost)
    return (similarity * torch.from_numpy(flow)).sum() * 12.5 / len(query)


def maps(count: int, channels: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Feature maps after a rectifier, with backgrounds that match nothing."""
    value = torch.randn(count, channels, side, side, generator=generator)
    return value.relu() + 0.1 * torch.rand(count, 1, side, side, generator=generator)


@pytest.mark.parametrize("sizes", [(), (2, 1)], ids=["map", "pyramid"])
def test_one_shot_logits(sizes: tuple[int, ...], generator: torch.Generator) -> None:
    """The code's "2,1" appends the raw map: 4 + 1 + 25 nodes."""
    feature_maps = maps(7, 64, 5, generator)
    nodes = pyramid_pool(feature_maps, sizes, include_map=True)
    by_torch = torch.cat(
        [
            torch.nn.functional.adaptive_avg_pool2d(feature_maps, size).flatten(2).mT
            for size in sizes
        ]
        + [feature_maps.flatten(2).mT],
        dim=1,
    )
    assert nodes.shape[1] == 25 + sum(size * size for size in sizes)
    support, query = nodes[:3], nodes[3:]
    found = EMDNearest(REFERENCE)(support[None, :, None], query[None])[0]
    expected = torch.stack(
        [torch.stack([plain_logit(q, p) for p in by_torch[:3]]) for q in by_torch[3:]]
    )
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(84, 84), (120, 91)])
def test_grid_boxes(size: tuple[int, int]) -> None:
    """Cells of a 2 x 2 and a 3 x 3 grid, doubled about their centres, clamped to the border."""
    height, width = size
    boxes = GridLayout((2, 3), context=2.0, training_context=(1.0, 3.0)).evaluation(
        height, width, torch.Generator()
    )
    expected = []
    for level in (2, 3):
        cell_height, cell_width = height / level, width / level
        for row in range(level):
            for column in range(level):
                middle_x, middle_y = (column + 0.5) * cell_width, (row + 0.5) * cell_height
                expected.append(
                    [
                        max(middle_x - cell_width, 0),
                        max(middle_y - cell_height, 0),
                        min(middle_x + cell_width, width),
                        min(middle_y + cell_height, height),
                    ]
                )
    assert boxes.shape == (13, 4)
    # Whole pixels: at most half a pixel from where the cells lie.
    assert (boxes - torch.tensor(expected)).abs().max() <= 0.5


@pytest.mark.parametrize("learning_rate", [0.1, 100.0])
def test_first_steps_of_the_structured_layer(
    learning_rate: float, generator: torch.Generator
) -> None:
    """SGD by hand: momentum and dampening .9, no decay; gradients through the similarities only."""
    support = maps(6, 32, 3, generator).flatten(2).mT.unflatten(0, (3, 2))
    tuning = FineTuning(learning_rate=learning_rate, batch_size=4, passes=2)
    assert (tuning.momentum, tuning.dampening, tuning.weight_decay) == (0.9, 0.9, 0.0)
    assert (SFC_REFERENCE.batch_size, SFC_REFERENCE.passes) == (4, 100)
    classifier = StructuredFC(REFERENCE, fine_tuning=tuning)
    learned = classifier.learn(classifier.prepare(support[None]))[0]

    layer = support.mean(dim=1)
    start, velocity = layer, None
    images, labels = support.flatten(0, 1), torch.tensor([0, 0, 1, 1, 2, 2])
    for places in tuning.schedule(6):
        parameter = layer.clone().requires_grad_()
        losses = [
            -torch.stack([plain_logit(images[i], proto) for proto in parameter]).log_softmax(0)[
                labels[i]
            ]
            for i in places.tolist()
        ]
        (gradient,) = torch.autograd.grad(sum(losses) / len(losses), parameter)
        velocity = gradient if velocity is None else 0.9 * velocity + 0.1 * gradient
        layer = layer - learning_rate * velocity
    moved = (layer - start).abs().max()
    assert moved > 1e-4 * learning_rate
    torch.testing.assert_close(learned, layer, atol=1e-4, rtol=1e-4)
