"""The settings that are searched for each hashing method."""

from recpress.trainer.compare.config import CompareHashConfig
from recpress.trainer.compare.hash_settings import BY_DISTORTION, BY_IDS, NAMES, search_axes, setting_of

CONFIG = CompareHashConfig()


def test_each_method_has_the_axes_that_it_uses_and_starts_at_the_default():
    axes = {method: search_axes(CONFIG, method) for method in NAMES}
    assert set(axes["modulo"]) == {"user_share", "sweeps"}
    assert set(axes["louvain"]) == {"sweeps"}  # it splits the rows itself
    assert axes["modulo"]["user_share"][0] == BY_IDS
    assert BY_DISTORTION in axes["learned"]["user_share"]
    assert BY_DISTORTION not in axes["modulo"]["user_share"]
    assert axes["learned"]["sweeps"][0] == 1
    assert all(len(axes[method]) == 3 for method in ("frequency", "hybrid", "learned", "learned-2"))


def test_a_setting_is_a_point_on_the_axes():
    values = {axis: points[-1] for axis, points in search_axes(CONFIG, "learned-2").items()}
    setting = setting_of(CONFIG, "learned-2", values)
    assert setting.hash.method == "learned"
    assert setting.user_share == BY_DISTORTION
    assert setting.words()["users' share of rows"] == "by distortion"
    assert setting.hash != setting_of(CONFIG, "learned", values).hash  # two rows per id
