"""`brigade experts`: the heat map in the terminal and as a picture, from what a server says."""

import json
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from brigade.cli import app
from brigade.cli.experts import show
from brigade.cli.heatmap import Panel, colour, ink_on, over_mean, span
from brigade.engine.loads import ExpertLoads, Experts, LayerLoads, Moved, UnitLoads
from tests.cli.saying import Server, saying
from tests.serve.fake_engine import some_loads

KEY = "a-key-of-some-length"


@pytest.fixture
def server() -> Iterator[Server]:
    with saying(msgspec.json.encode(Experts([UnitLoads("mixed-0", some_loads())]))) as server:
        yield server


def run(server: Server, *args: str) -> tuple[int, str, str]:
    told = ["experts", "--url", server.url, *args]
    result = CliRunner(env={"BRIGADE_API_KEY": KEY, "COLUMNS": "120"}).invoke(app, told)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def shown(loads: ExpertLoads, width: int = 100) -> str:
    out = StringIO()
    show(Console(file=out, width=width), loads)
    return out.getvalue()


def of_ranks(n: int) -> ExpertLoads:
    layer = LayerLoads(1, [9], [9.0], [0], list(range(n)), list(range(n)), 1.9, 1.9, [1] * n)
    return ExpertLoads(n, 1, 0, 60.0, [], 1.9, 1.9, 1.0, Moved(0, 0, 0, None), [layer])


def test_it_asks_with_the_key_and_shows_both_maps(server: Server) -> None:
    code, out, _ = run(server)
    assert code == 0
    assert server.asked == ("/debug/experts", f"Bearer {KEY}")
    assert "1.50 as placed at the start, 1.17 as placed now" in out
    before, now = out.split("as placed now\n")[-2:]
    assert "layer   1   2.00  0.00   2.00" in before
    assert "layer   1   1.00  1.00   1.00" in now


def test_units_are_shown_one_by_one_and_a_picture_is_of_one(server: Server, tmp_path: Path) -> None:
    units = [UnitLoads("prefill-0", some_loads()), UnitLoads("decode-0", None, "the worker is being restarted")]
    server.body = msgspec.json.encode(Experts(units))
    _, out, _ = run(server)
    assert "unit prefill-0\nExpert load" in out
    assert "unit decode-0\nthe worker is being restarted" in out
    assert "unit" not in run(server, "--unit", "prefill-0")[1].splitlines()[0]
    png = ("--png", str(tmp_path / "heat.png"))
    for arguments, code, message in (
        (png, 2, "--png draws one unit; name it with --unit: prefill-0, decode-0"),
        ((*png, "--unit", "decode-0"), 1, "decode-0: the worker is being restarted"),
        (("--unit", "decode-1"), 2, "there is no unit 'decode-1'; there are: prefill-0, decode-0"),
    ):
        got, _, err = run(server, *arguments)
        assert (got, message in err) == (code, True), err
    assert run(server, *png, "--unit", "prefill-0")[0] == 0


def test_where_nothing_moved_there_is_one_map() -> None:
    text = shown(replace(some_loads(), moved=Moved(0, 0, 0, None)))
    assert text.count("layer   1") == 1


def test_many_ranks_share_a_cell_and_it_says_so() -> None:
    assert "rank" in shown(of_ranks(40))
    text = shown(of_ranks(640), width=100)
    assert "each cell is the busiest of 8 ranks" in text
    assert max(map(len, text.splitlines())) <= 100


def test_portions_that_were_dropped_are_told() -> None:
    assert "2 portions could not be moved" in shown(replace(some_loads(), moved=Moved(3, 1, 2, None)), width=200)


def test_the_picture_is_a_png_with_the_colours_of_the_loads(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "heat.png"
    assert run(server, "--png", str(file))[0] == 0
    with Image.open(file) as image:
        assert image.format == "PNG"
        seen = {c for _, c in image.convert("RGB").getcolors(1 << 20) or []}
    assert {colour(v, 1.0) for v in (2.0, 0.0, 1.0, 0.75, 1.25)} <= seen


def test_what_the_server_said_can_be_kept(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    run(server, "--json", str(file))
    code, out, _ = run(server, "--json", "-")
    assert (code, json.loads(out)) == (0, json.loads(file.read_bytes()))


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b'{"error": {"message": "this model has no routed experts"}}', "this model has no routed experts"),
        (200, b"{}", "did not answer as this version of Brigade does"),
        (200, b"<html>", "did not answer as this version of Brigade does"),
        (
            200,
            msgspec.json.encode(Experts([UnitLoads("mixed-0", replace(some_loads(), n_ranks=3))])),
            "layers of other ranks",
        ),
    ],
)
def test_another_answer_is_one_line(server: Server, status: int, body: bytes, message: str) -> None:
    server.status, server.body = status, body
    code, _, err = run(server)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_and_a_file_that_cannot_be_written_are_one_line(server: Server) -> None:
    result = CliRunner().invoke(app, ["experts", "--url", "http://127.0.0.1:9"])
    assert (result.exit_code, "is the server running?" in result.stderr) == (1, True)
    code, _, err = run(server, "--png", "/nowhere/heat.png")
    assert (code, "cannot write /nowhere/heat.png" in err) == (1, True)


class TestColours:
    def test_the_mean_is_white_more_is_red_less_is_blue(self) -> None:
        assert colour(1.0, 0.5) == (247, 247, 247)
        assert colour(1.4, 0.5)[0] > colour(1.4, 0.5)[2]
        assert colour(0.6, 0.5)[0] < colour(0.6, 0.5)[2]
        assert colour(9.0, 0.5) == colour(1.5, 0.5)

    def test_nothing_has_the_end_of_blue_however_far_the_scale_reaches(self) -> None:
        assert colour(0.0, 8.0) == colour(0.0, 1.0)

    def test_one_scale_reaches_all_panels(self) -> None:
        assert span([Panel("a", [[1.0, 1.0]]), Panel("b", [[0.6, 1.4]])]) == 0.5
        assert span([Panel("a", [[99.0]])]) == 8.0

    def test_text_can_be_read_on_each_colour(self) -> None:
        assert ink_on(colour(1.0, 1)) != ink_on(colour(2.0, 1)) == ink_on(colour(0.0, 1))

    def test_a_layer_without_load_is_even(self) -> None:
        assert over_mean([[0, 0], [1, 3]]) == [[1.0, 1.0], [0.5, 1.5]]
