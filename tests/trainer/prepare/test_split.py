"""`recpress split` as a command."""

import pyarrow as pa
import pyarrow.parquet as pq

from recpress.trainer.cli import main


def test_it_says_how_many_users_have_no_test_row(tmp_path, capsys):
    users, items = zip(
        *[(u, (u + k) % 9) for u in range(6) for k in range(2)], (6, 0), *[(7, i) for i in range(9)], strict=True
    )
    pq.write_table(pa.table({"user_id": users, "item_id": items}), tmp_path / "train.parquet")
    assert main(["split", "--data", str(tmp_path), "--out", f"{tmp_path}-out", "--negatives", "5"]) == 0
    assert "6 held out; none of 2 users" in capsys.readouterr().out
    assert main(["split", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--negatives", "5"]) == 2
    assert "is in the input" in capsys.readouterr().err
    assert main(["split", "--data", "", "--out", f"{tmp_path}-out", "--negatives", "5"]) == 2
    assert "empty path" in capsys.readouterr().err


def test_errors_name_the_options_that_help(tmp_path, capsys):
    pq.write_table(pa.table({"user_id": [0, 0, 1, 1], "item_id": [0, 1, 1, 2]}), tmp_path / "train.parquet")
    command = ["split", "--data", str(tmp_path), "--out", f"{tmp_path}-out", "--negatives", "0"]
    assert main([*command, "--by", "last"]) == 2
    assert "name it with --schema.time" in capsys.readouterr().err
    assert main(command) == 0
    assert main(command) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
