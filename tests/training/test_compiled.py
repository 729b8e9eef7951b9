import pytest
import torch
from training.recipes import small_birds, small_recipe

from emd_retrieval.training import TrunkCache, build_model
from emd_retrieval.training.compiled import compile_trunk


def extractor_of(**changes):
    return build_model(small_recipe(**changes)).extractor.eval()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fcn", "grid"])
def test_a_compiled_trunk_gives_the_same_features(method, monkeypatch):
    """In parts of one size, the last one filled up: one program serves batches of any length."""
    monkeypatch.setattr("emd_retrieval.training.compiled._PIXELS_AT_ONCE", 4 * 40 * 40)
    extractor = extractor_of(model__method=method)
    transform = extractor.evaluation_transform(resize=48, crop=40)
    birds = small_birds()
    views = torch.stack([transform(birds.load(row)) for row in range(6)])
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    compiled = compile_trunk(extractor)
    with torch.inference_mode():
        for count in (6, 3):
            expected, found = extractor.trunk(views[:count]), compiled.trunk(views[:count])
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert compiled.describe() == extractor.describe()
    after = extractor.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_compiling_is_no_part_of_a_stores_name_and_waits_until_it_is_needed(tmp_path, monkeypatch):
    """Where all features are there nothing is compiled."""
    recipe = small_recipe()

    def cache(compiled):
        return TrunkCache(
            folder=tmp_path, extractor=build_model(recipe).extractor, views=recipe.views,
            workers=0, compiled=compiled,
        )  # fmt: skip

    made = cache(compiled=False).store(small_birds())
    monkeypatch.setattr("emd_retrieval.training.trunk_cache.compile_trunk", None)
    found = cache(compiled=True).store(small_birds())
    assert torch.equal(made.nodes(), found.nodes())


def test_no_compiler_is_told(monkeypatch):
    def fail(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(fail, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    compiled = compile_trunk(extractor_of())
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"^compile: torch.compile failed"),
    ):
        compiled.trunk(torch.zeros(1, 3, 40, 40))
