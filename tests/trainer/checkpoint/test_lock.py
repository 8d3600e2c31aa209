"""One run at a time writes into a folder of checkpoints."""

import pytest
from recpress.data.errors import InputError
from recpress.trainer.checkpoint.places import LocalPlace


def test_a_second_run_is_refused_at_its_start_until_the_first_has_ended(tmp_path):
    first, second = (LocalPlace(str(tmp_path / "model.checkpoints"), 0) for _ in range(2))
    first.prepare()
    with pytest.raises(InputError, match=r"in use by a run that is not finished.*process"):
        second.prepare()
    first.unlock()
    second.prepare()
    second.remove_all()
    assert list(tmp_path.iterdir()) == []
