"""Which changes a resumed run may have."""

import pytest

from recpress.data.errors import InputError
from recpress.trainer.checkpoint.resume_check import check_resume

MADE = {"config": {"out": "a", "epochs": 3, "watch": {"port": 0}}, "inputs": {"log": "1", "factors": "2"}}


def test_outputs_and_monitoring_may_change():
    check_resume("step-1", MADE, {**MADE, "config": {"out": "b", "epochs": 3, "watch": {"port": 9400}}})


def test_other_settings_are_named_with_both_values():
    with pytest.raises(InputError, match=r"step-1: written with other settings \(epochs: 3 -> 4\)"):
        check_resume("step-1", MADE, {**MADE, "config": MADE["config"] | {"epochs": 4}})


def test_another_input_is_named():
    with pytest.raises(InputError, match=r"written with another factors: fingerprint 2, now 5"):
        check_resume("step-1", MADE, {**MADE, "inputs": {"log": "1", "factors": "5"}})
