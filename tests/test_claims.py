"""claims.py: the rows are the paper's, verdicts follow the rule, the document says what was measured."""

import json
import sys
from pathlib import Path

import pytest

import claims
from claims import CLAIMS, MEASURES, ROWS, Args, Claim, tables, verdict
from runtime import UserError

DOCUMENT = Path(claims.__file__).parent / "docs" / "claims.md"


def seeds(*values: float) -> list[dict[str, float]]:
    return [dict.fromkeys(MEASURES, value) for value in values]


@pytest.mark.parametrize(
    "less, more, said, said_of_at_most",
    [
        ((1, 2, 3), (4, 5, 6), "holds here", "holds here"),
        ((4, 5, 6), (1, 2, 3), "does not", "does not"),
        ((1, 2, 4), (3, 5, 6), "undecided", "holds here"),
        ((1, 1, 1), (1, 1, 1), "undecided", "holds here"),
    ],
)
def test_a_verdict_needs_every_seed_of_one_row_on_one_side_of_every_seed_of_the_other(
    less, more, said, said_of_at_most
):
    scores = {"a": seeds(*less), "b": seeds(*more)}
    claim = Claim("1", "a is less", "PSNR", "a", "b")
    assert verdict(claim, scores) == said
    assert verdict(claim._replace(at_most=True), scores) == said_of_at_most


def test_every_claim_is_about_two_rows_of_one_recipe():
    for claim in CLAIMS:
        assert ROWS[claim.less].stage == ROWS[claim.more].stage and claim.measure in MEASURES


def test_no_two_rows_share_a_file():
    assert len({claims.file_name(row, 0) for row in ROWS}) == len(ROWS)


def test_an_unknown_row_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["claims.py", "--rows", "3D"])
    with pytest.raises(UserError, match="--rows 3D: give some of 2D, "):
        claims.main()


@pytest.mark.slow
def test_a_row_is_trained_scored_and_kept_and_not_trained_again(tmp_path, monkeypatch, capsys):
    small = "--steps 2 --teacher-cache '' --procedural 1 --frames 3 --size 32 --batch 1 --workers 0"
    small += " --dists seeded --every 2 --halve-at 1"
    given = ["--rows", "2D", "2D + 1D", "--seeds", "1", "--clips", "1", "--out", str(tmp_path / "json")]
    given += ["--runs", str(tmp_path / "runs"), f"--flags={small}"]
    monkeypatch.setattr(sys, "argv", ["claims.py", *given])
    claims.main()
    said = capsys.readouterr().out
    assert "| 2D + 1D | " in said and "1D blocks take the flicker" in said and "doubling" not in said
    files = sorted((tmp_path / "json").iterdir())
    assert [file.name for file in files] == ["2D_0.json", "2D_1D_0.json"]
    assert json.loads(files[0].read_text())["row"] == "2D"
    monkeypatch.setattr(claims, "train", lambda *_: pytest.fail("trained again"))
    claims.main()
    assert capsys.readouterr().out.strip() == said[said.index("| | PSNR") :].strip()


def test_the_document_shows_the_tables_of_the_committed_results():
    scores = {}
    for row in ROWS:
        files = sorted((DOCUMENT.parent / "claims").glob(f"{claims.file_name(row, 0)[:-1]}[0-9].json"))
        if results := [json.loads(file.read_text()) for file in files]:
            assert {result["row"] for result in results} == {row}
            scores[row] = results
    if not scores:
        pytest.skip("no row has been run yet")
    assert tables(scores) in DOCUMENT.read_text()


def test_the_default_is_three_seeds_of_every_row():
    assert Args().seeds == 3 and Args().rows == ()
