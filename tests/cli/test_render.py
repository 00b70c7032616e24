"""Reports as JSON documents and as text for people; progress on stderr."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.cli.progress import LINE_INTERVAL_S, PlainLines, progress_on_stderr
from memupdate.cli.render import emit, format_value, label, shorten, to_plain
from memupdate.law.points import Interval
from memupdate.progress import ProgressEvent


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Row:
    name: str
    size_bytes: int
    loss_nats: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    release: str
    predicted_loss_nats: Interval
    duration_s: float
    proved_share: float
    rows: tuple[Row, ...]
    messages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


OUTCOME = Outcome(
    "acme@v2",
    Interval(0.1, 0.2, 0.3),
    61.25,
    0.987,
    (Row("Zoë [red]", 2048, 0.5), Row("b", 3, None)),
    ("alias acme now answers from acme@v2",),
)


def test_json_is_one_document_with_version_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    emit("add", OUTCOME, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema_version": 1, "command": "add", **json.loads(json.dumps(OUTCOME.to_dict()))}


def test_json_of_a_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    emit("releases list", OUTCOME.rows, as_json=True)
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["Zoë [red]", "b"]


def test_people_see_units_messages_and_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    emit("add", OUTCOME, as_json=False)
    text = capsys.readouterr().out
    for expected in ("acme@v2", "0.2 (0.1 to 0.3)", "61.2 s", "98.7 %", "2.0 KiB", "Zoë [red]", "loss (nats)"):
        assert expected in text
    assert text.rstrip().endswith("alias acme now answers from acme@v2")


def test_an_empty_list_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    emit("facts list", [], as_json=False)
    assert capsys.readouterr().out == "facts list: nothing to show\n"


def test_hidden_keys_stay_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    emit("add", OUTCOME, as_json=False, hide=("rows",))
    assert "Zoë" not in capsys.readouterr().out
    emit("add", OUTCOME, as_json=True, hide=("rows",))
    assert "rows" in json.loads(capsys.readouterr().out)


def test_columns_choose_and_order(capsys: pytest.CaptureFixture[str]) -> None:
    emit("list", OUTCOME.rows, as_json=False, columns=("size_bytes", "name", "unknown"))
    text = capsys.readouterr().out
    assert text.index("size") < text.index("name")
    assert "loss" not in text


def test_plain_values() -> None:
    value = {"path": Path("a/b"), "colour": Colour.RED, 3: (1, math.inf, math.nan), "interval": Interval(1, 2, 3)}
    assert to_plain(value) == {
        "path": "a/b",
        "colour": "red",
        "3": [1, None, None],
        "interval": {"low": 1, "mid": 2, "high": 3},
    }
    with pytest.raises(TypeError, match="object"):
        to_plain(object())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(JSON_VALUES)
def test_anything_plain_can_be_written_and_is_stable(value: Any) -> None:
    plain = to_plain(value)
    json.dumps(plain, allow_nan=False)
    assert to_plain(plain) == plain
    assert isinstance(format_value("loss_nats", plain), str)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("adapter_bytes", 5 * 1024**2, "5.0 MiB"),
        ("adapter_bytes", 3 * 1024**3, "3.0 GiB"),
        ("duration_s", 600.0, "10.0 min"),
        ("kl_nats", 0.004567, "0.004567"),
        ("facts", 12345, "12,345"),
        ("served", True, "yes"),
        ("kl_nats", None, "–"),
        ("ranks", [1, 8], "1, 8"),
    ],
)
def test_values_are_read_by_their_unit(key: str, value: Any, expected: str) -> None:
    assert format_value(key, value) == expected


def test_labels_and_shortening() -> None:
    assert label("created_at_utc") == "created at (UTC)"
    assert label("adapter_bytes") == "adapter"
    assert shorten("a\n b") == "a b"
    assert len(shorten("x" * 500)) == 60


def test_plain_progress_is_rare_but_shows_start_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 0.0
    lines = PlainLines(clock=lambda: now_s)
    for step in range(101):
        now_s = step * 0.25
        lines(ProgressEvent("train", step, 100, message="loss 0.5" if step == 0 else ""))
    captured = capsys.readouterr()
    assert captured.out == ""
    shown = captured.err.splitlines()
    assert shown[0] == "train: 0/100, loss 0.5"
    assert shown[-1] == "train: 100/100"
    assert len(shown) == 2 + int(25 / LINE_INTERVAL_S)


def test_progress_survives_a_closed_stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = (tmp_path / "err").open("w")
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    PlainLines()(ProgressEvent("prove", 1, 2))


def test_bars_go_to_a_terminal_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress_on_stderr() as progress:
        progress(ProgressEvent("train", 0, None))
        progress(ProgressEvent("train", 5, 10, message="[bold]as it is"))
        progress(ProgressEvent("train", 10, 10))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "train" in captured.err
