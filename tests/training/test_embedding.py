import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import nn

from emd_retrieval.features import FCNExtractor
from emd_retrieval.features.small_resnet import SmallResNet, small_backbone
from emd_retrieval.metric_learning import DeepEMDSimilarity
from emd_retrieval.training import EmbeddingTask, ImageBatches, TrainingSchedule, train_embedding


@pytest.fixture
def batches(generator):
    # Two classes that differ in where they are bright: easy, so that a few steps show in the loss.
    images = torch.randint(60, (24, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(24) % 3
    for label in range(3):
        images[labels == label, label] += 150
    return ImageBatches(
        images,
        labels,
        classes_per_batch=3,
        images_per_class=4,
        mean=(0.3,) * 3,
        std=(0.3,) * 3,
    )


def extractor():
    torch.manual_seed(0)
    return FCNExtractor(small_backbone((8, 8, 16)), pyramid=(2, 1), embedding_size=8)


@pytest.mark.parametrize("pooled", [True, False])
def test_training_lowers_the_loss(pooled, batches):
    distance = {} if pooled else {"distance": DeepEMDSimilarity(8)}
    loss = MultiSimilarityLoss(alpha=2, beta=20, base=0.5, **distance)
    task = EmbeddingTask(
        extractor(), loss, TrainingSchedule(steps=25, warmup_steps=3), pooled=pooled
    )
    before = task.extractor.embedder.weight.detach().clone()
    train_embedding(task, batches)
    assert len(task.losses) == 25
    assert sum(task.losses[-5:]) < 0.9 * sum(task.losses[:5])
    assert not torch.equal(task.extractor.embedder.weight, before)
    assert not task.training


def test_the_same_seed_gives_the_same_model(batches):
    def weights():
        loss = MultiSimilarityLoss(distance=DeepEMDSimilarity(8))
        task = EmbeddingTask(extractor(), loss, TrainingSchedule(steps=3))
        return train_embedding(task, batches).extractor.embedder.weight

    assert torch.equal(weights(), weights())


def test_a_miner_takes_part(batches):
    distance = DeepEMDSimilarity(8)
    task = EmbeddingTask(
        extractor(),
        MultiSimilarityLoss(distance=distance),
        TrainingSchedule(steps=2),
        miner=MultiSimilarityMiner(distance=distance),
    )
    train_embedding(task, batches)
    assert all(value >= 0 for value in task.losses)


class BrokenLoss(nn.Module):
    def forward(self, embeddings, labels, mined):
        return (embeddings * float("nan")).sum()


def test_a_loss_that_is_not_finite_stops_the_run(batches):
    task = EmbeddingTask(extractor(), BrokenLoss(), TrainingSchedule(steps=5), pooled=True)
    with pytest.raises(ValueError, match="loss: BrokenLoss is nan at step 0; lower the learning"):
        train_embedding(task, batches)


def test_batches_that_run_out_start_again(batches):
    first_two = [batch for _, batch in zip(range(2), batches, strict=False)]
    task = EmbeddingTask(extractor(), ContrastiveLoss(), TrainingSchedule(steps=5), pooled=True)
    assert len(train_embedding(task, first_two).losses) == 5


def test_schedule_warms_up_and_falls():
    schedule = TrainingSchedule(steps=100, warmup_steps=10)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[9] == pytest.approx(1.0)
    assert factors[-1] < 0.01
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"steps": 1, "learning_rate": -1.0}, "learning_rate: expected a positive number"),
        ({"steps": 1, "weight_decay": -1.0}, "weight_decay: expected zero or more"),
    ],
)
def test_schedule_refuses_bad_input(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainingSchedule(**setting)


def test_small_resnet_halves_the_side_by_eight():
    backbone = small_backbone()
    assert backbone.channels == 96
    assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, 96, 8, 8)
    with pytest.raises(ValueError, match="widths: expected two or more positive numbers"):
        SmallResNet((8,))
