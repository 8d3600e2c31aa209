"""Settings of a pipeline that make no sense."""

import pytest

from recpress.data.errors import InputError
from recpress.trainer.config import TrainConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.pipeline.config import PipelineConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, "stages: none"),
        ({"stages": ("train", "train")}, "each once"),
        ({"train": TrainConfig(data="", out="", overwrite=True)}, r"train\.overwrite"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        PipelineConfig(data="log", out="out", **changes)


@pytest.mark.parametrize(("method", "rate"), [("als", 0.1), ("softmax", 0.1), ("auto", 0.1), ("logistic", 0.0)])
def test_a_network_on_frozen_tables_gets_cross_fitted_factors_of_every_method_that_has_them(method, rate):
    factorize = FactorizeConfig(data="", out="", method=method)
    assert PipelineConfig(data="log", out="out", factorize=factorize).chosen()["factorize"].crossfit_rate == rate
