import pytest
from composer.algorithms import GradientClipping
from pydantic import ValidationError

from llmtrain.training.algorithms import AlgorithmsConfig, build_algorithms


def test_nothing_asked_nothing_built() -> None:
    assert build_algorithms(None) == []
    assert build_algorithms(AlgorithmsConfig()) == []
    assert build_algorithms(AlgorithmsConfig.model_validate({"seq_length_warmup": {}})) == []  # changes the data


@pytest.mark.parametrize("kind", ["norm", "value", "adaptive"])
def test_gradient_clipping(kind: str) -> None:
    config = AlgorithmsConfig.model_validate(
        {"gradient_clipping": {"clipping_type": kind, "clipping_threshold": "1e-2"}}
    )
    (algorithm,) = build_algorithms(config)
    assert isinstance(algorithm, GradientClipping)
    assert (algorithm.clipping_type, algorithm.clipping_threshold) == (kind, 0.01)


@pytest.mark.parametrize("settings", [{"clipping_type": "norms", "clipping_threshold": 1}, {"clipping_type": "norm"},
                                      {"clipping_type": "norm", "clipping_threshold": 0}])  # fmt: skip
def test_bad_clipping_is_refused(settings: dict) -> None:
    with pytest.raises(ValidationError):
        AlgorithmsConfig.model_validate({"gradient_clipping": settings})


def test_an_override_can_switch_off() -> None:
    assert build_algorithms(AlgorithmsConfig.model_validate({"gradient_clipping": False})) == []
