"""quality.py: measures rank what is known."""

import pytest

from infer import SHIPPED
from quality import Args, measure, unseen_clips


@pytest.mark.slow
def test_the_truth_is_first_and_a_student_above_bicubic(tmp_path):
    args = Args(clips=1, picture=str(tmp_path / "picture.png"))
    means = measure(unseen_clips(args), args)
    bicubic, student, truth = (means["procedural", side] for side in ("bicubic", str(SHIPPED), "HR"))
    assert bicubic[0] < student[0] < truth[0] == float("inf")  # PSNR
    assert bicubic[2] < student[2] < truth[2] == pytest.approx(1)  # detail
    assert student[4] < bicubic[4]  # E*_warp under the exact flow
    assert (tmp_path / "picture.png").stat().st_size > 10_000
