"""Settings of a pipeline that make no sense."""

import pytest

from recpress.data.errors import InputError
from recpress.trainer.config import TrainConfig
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
