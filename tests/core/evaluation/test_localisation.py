"""Class activation maps against their formula, boxes and overlaps by hand."""

import pytest
import torch
from dataopt.core.evaluation import box_of_map, class_activation_map, localisation_accuracy
from torch import nn

from .conftest import Net, quadrants


def test_map_is_the_weighted_sum_of_the_features(trained):
    x, _, _ = quadrants(5, 0)
    trained.train()
    classes = torch.tensor([0, 1, 2, 0, 1])
    maps = class_activation_map(trained, x, "body", "fc", classes)
    assert trained.training and not maps.requires_grad
    trained.eval()
    with torch.no_grad():
        features, logits = trained.body(x), trained(x)
        direct = (trained.fc.weight[classes][:, :, None, None] * features).sum(1)
    torch.testing.assert_close(maps, direct)
    torch.testing.assert_close(maps.mean((1, 2)) + trained.fc.bias[classes], logits[range(5), classes])
    predicted = class_activation_map(trained, x, "body", "fc")
    torch.testing.assert_close(predicted, class_activation_map(trained, x, "body", "fc", logits.argmax(1)))
    assert not trained.body._forward_hooks


def test_box_of_a_map_by_hand():
    activation = torch.zeros(8, 10)
    activation[2:5, 3:9] = 1.0  # 18 cells
    activation[6:8, 0:4] = 4.0  # 8 cells, the brightest
    assert box_of_map(activation, (8, 10), 0.2).tolist() == [3, 2, 9, 5]  # the largest part, not the brightest
    assert box_of_map(activation, (8, 10)).tolist() == [0, 6, 4, 8]  # a quarter is not above a quarter
    activation[5, 4] = 4.0  # joins them
    assert box_of_map(activation, (8, 10), 0.2).tolist() == [0, 2, 9, 8]
    assert box_of_map(torch.full((3, 3), 2.0), (6, 9)).tolist() == [0, 0, 9, 6]
    shifted = 5 - 2 * activation
    assert box_of_map(-shifted, (8, 10), 0.2).tolist() == [0, 2, 9, 8]  # neither offset nor scale matter


def test_box_in_pixels_of_a_larger_image():
    activation = torch.zeros(4, 4)
    activation[1, 2] = 1
    # bilinear over cells of 8 pixels: above a quarter up to 0.75 cells from the centre (2.5, 1.5), along each axis
    assert box_of_map(activation, (32, 32)).tolist() == [14, 6, 26, 18]


class Painted(nn.Module):
    """Its features are the input's first two channels; class 0 sees the first, class 1 the second."""

    def __init__(self):
        super().__init__()
        self.features = nn.Identity()
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(2))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def test_accuracy_by_hand():
    x = torch.zeros(4, 2, 10, 10)
    x[:, 0, 0:4, 0:4] = 1  # class 0 looks here: box 0, 0, 4, 4
    x[:, 1, 5:10, 5:10] = 0.1
    boxes = [
        torch.tensor([[0, 0, 4, 8]]),  # overlap 16 / 32 = 0.5, just enough
        torch.tensor([[0, 0, 4, 9]]),  # 16 / 36
        torch.tensor([[0, 0, 9, 9], [1, 0, 4, 4]]),  # 16 / 81 and 12 / 16: the best counts
        torch.tensor([[5, 5, 10, 10]]),  # where class 1 looks
    ]
    y = torch.tensor([0, 0, 0, 1])  # the last is taken for class 0
    result = localisation_accuracy(
        Painted(), [(x[:3], y[:3], boxes[:3]), (x[3:], y[3:], boxes[3:])], "features", "head"
    )
    assert (result.top1, result.known) == (0.5, 0.75)
    strict = localisation_accuracy(Painted(), [(x, y, boxes)], "features", "head", iou=0.6)
    assert (strict.top1, strict.known) == (0.25, 0.5)


def test_a_trained_network_looks_at_the_squares(trained):
    x, y, boxes = quadrants(60, 11)
    found = localisation_accuracy(trained, [(x, y, boxes)], "body", "fc")
    turned = localisation_accuracy(trained, [(x, y, 16 - boxes[:, [2, 3, 0, 1]])], "body", "fc")
    assert found.top1 > 0.9 > 0.5 > turned.top1


def test_bad_input(trained):
    x, y, boxes = quadrants(4, 0)
    with pytest.raises(ValueError, match="features='layer4' is no module"):
        class_activation_map(trained, x, "layer4", "fc")
    with pytest.raises(ValueError, match="head='drop' is a Dropout"):
        class_activation_map(trained, x, "body", "drop")
    with pytest.raises(ValueError, match=r"give \(B, D, h, w\)"):
        class_activation_map(trained, x, "drop", "fc")
    with pytest.raises(ValueError, match=r"not head='fc' of the global average of features='body\.0'"):
        class_activation_map(trained, x, "body.0", "fc")
    with pytest.raises(ValueError, match="not head='fc' of the global average"):
        class_activation_map(trained, x, "body.3", "fc")  # the last ReLU is missing
    with pytest.raises(ValueError, match="labels range from 7"):
        class_activation_map(trained, x, "body", "fc", torch.full((4,), 7))
    with pytest.raises(ValueError, match="threshold=1"):
        box_of_map(torch.rand(3, 3), (9, 9), 1)
    with pytest.raises(ValueError, match="finite map"):
        box_of_map(torch.rand(1, 3, 3), (9, 9))
    with pytest.raises(ValueError, match="iou=0"):
        localisation_accuracy(trained, [(x, y, boxes)], "body", "fc", iou=0)
    with pytest.raises(ValueError, match="boxes are those of 2 images"):
        localisation_accuracy(trained, [(x, y, boxes[:2])], "body", "fc")
    with pytest.raises(ValueError, match="batches is empty"):
        localisation_accuracy(Net(), [], "body", "fc")
