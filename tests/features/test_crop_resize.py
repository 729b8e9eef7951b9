import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from emd_retrieval.features import crop_resize

BOXES = [[0, 0, 90, 70], [10, 5, 42, 37], [0, 20, 30, 70], [60, 0, 90, 9], [44, 33, 45, 34]]


@pytest.fixture
def images():
    """Two smooth pictures with an edge each."""
    y, x = np.mgrid[:70, :90] / 20
    waves = [np.sin(x * (i + 2) + i) * np.cos(y * (3 - i)) for i in range(3)]
    first = np.stack(waves)
    second = np.where(x + y > 3.3, 1 - first, -0.9)
    pixels = np.stack([first, second]) * 70 + 128
    return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))


def boxes_of(*boxes):
    return torch.tensor(boxes)


@pytest.mark.parametrize("size", [1, 16, 32, 61])
def test_as_pillow(size, images):
    """Cut, then Pillow's antialiased bicubic resize."""
    patches = crop_resize(images, boxes_of(BOXES, BOXES), size)
    assert patches.shape == (2, 5, 3, size, size)
    assert patches.dtype == torch.uint8
    for image, some in zip(images, patches, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for box, patch in zip(BOXES, some, strict=True):
            expected = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
            difference = patch.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
            assert np.abs(difference).max() <= 2, "both round between the two axes"
            assert (difference != 0).mean() < 0.1 or size == 1


def test_floats_as_torchvision(images, generator):
    exact = torch.randn(2, 4, 70, 90, generator=generator)
    patches = crop_resize(exact, boxes_of(BOXES[:3], BOXES[1:4]), 24)
    for image, boxes, some in zip(exact, (BOXES[:3], BOXES[1:4]), patches, strict=True):
        for (left, top, right, bottom), patch in zip(boxes, some, strict=True):
            expected = v2.functional.resized_crop(
                image, top, left, bottom - top, right - left, [24, 24],
                interpolation=v2.InterpolationMode.BICUBIC, antialias=True,
            )  # fmt: skip
            torch.testing.assert_close(patch, expected)


def test_a_box_of_the_size_asked_for_is_copied(images):
    patch = crop_resize(images[:1], boxes_of([[13, 8, 45, 40]]), 32)[0, 0]
    assert torch.equal(patch, images[0, :, 8:40, 13:45])


def test_nothing_outside_the_box_leaks_in(images):
    box = [20, 15, 50, 60]
    changed = 255 - images
    changed[:, :, 15:60, 20:50] = images[:, :, 15:60, 20:50]
    first, second = (crop_resize(some, boxes_of([box], [box]), 8) for some in (images, changed))
    assert torch.equal(first, second)


def test_layout_of_memory_does_not_matter(images):
    boxes = boxes_of(BOXES, BOXES)
    expected = crop_resize(images, boxes, 20)
    other = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop_resize(other, boxes.int(), 20), expected)


def test_gradients_reach_the_box_alone(generator):
    image = torch.rand(1, 1, 12, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    crop_resize(image, boxes_of([[2, 3, 8, 9]]), 4).sum().backward()
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[3:9, 2:8] = True
    assert torch.equal(image.grad[0, 0] != 0, inside)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU at hand")
def test_cuda_gives_the_same(images):
    boxes = boxes_of(BOXES, BOXES)
    exact = crop_resize(images.float(), boxes, 32).round().clamp(0, 255).to(torch.uint8)
    on_gpu = crop_resize(images.cuda(), boxes.cuda(), 32)
    assert on_gpu.dtype == torch.uint8
    assert (on_gpu.cpu().int() - exact.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ([5, 5, 5, 9], [5, 5, 5, 9]),
        ([5, 9, 8, 7], [5, 9, 8, 7]),
        ([-1, 0, 8, 8], [-1, 0, 8, 8]),
        ([0, 0, 91, 8], [0, 0, 91, 8]),
        ([0, 60, 8, 71], [0, 60, 8, 71]),
    ],
)
def test_boxes_that_are_none(box, told, images):
    with pytest.raises(ValueError) as caught:
        crop_resize(images, boxes_of(BOXES[:2], [BOXES[0], box]), 8)
    assert str(caught.value) == (
        "boxes: expected left < right and top < bottom inside 90 x 70 pixels; "
        f"box 1 of image 1 is {told}"
    )


def test_refuses_bad_input(images):
    boxes = boxes_of(BOXES, BOXES)
    with pytest.raises(
        ValueError, match=r"images: expected shape \[B, C, H, W\], got \[3, 70, 90\]"
    ):
        crop_resize(images[0], boxes, 8)
    with pytest.raises(ValueError, match=r"boxes: expected shape \[B, P, 4\], with B = 2, got \[1"):
        crop_resize(images, boxes[:1], 8)
    with pytest.raises(ValueError, match="size: expected a positive number, got 0"):
        crop_resize(images, boxes, 0)
    with pytest.raises(
        TypeError, match="boxes: expected whole pixels in an integer dtype, got tor"
    ):
        crop_resize(images, boxes.float(), 8)
    with pytest.raises(TypeError, match=r"images: expected uint8 or floating point, got dtype tor"):
        crop_resize(images.int(), boxes, 8)
