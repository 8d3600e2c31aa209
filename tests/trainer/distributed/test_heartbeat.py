"""What a rank does, as others see it."""

from recpress.trainer.distributed.heartbeat import activity, heartbeat, waiting_for_ranks


def test_a_step_has_an_activity_and_what_is_outside_has_none():
    heartbeat.in_step(7)
    assert (heartbeat.step, heartbeat.activity) == (7, "in the step")
    heartbeat.outside_step()
    assert (heartbeat.step, heartbeat.activity) == (None, "")


def test_activities_nest_and_end_with_their_block():
    with activity("building maps"):
        with activity("counting ids"):
            assert heartbeat.activity == "counting ids"
        assert heartbeat.activity == "building maps"
    assert heartbeat.activity == ""


def test_waiting_ends_with_its_block():
    with waiting_for_ranks():
        assert heartbeat.waiting_since is not None
    assert heartbeat.waiting_since is None
